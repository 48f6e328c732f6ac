from lightning_faast.cli import main
main()
