"""Methods as overlays: found, resolved and judged before anything runs."""

import pytest
import torch

from lightning_faast.associative import FastWeights, PaperRule
from lightning_faast.evaluation.methods import find_method, resolve, shipped_methods

RECIPE = "recipes/quickstart.yaml"


def test_shipped_methods_are_the_overlays():
    assert {"faast", "faast_regression", "faast_paper"} <= set(shipped_methods())


def test_options_win_over_overlay_and_recipe():
    config = resolve(["--config", RECIPE, "--config", "configs/methods/faast.yaml", "--data.limit_per_class=3"])
    assert config.data.init_args.limit_per_class == 3
    assert config.model.encoder.init_args.image_size == 96


def test_head_is_that_of_the_overlay():
    head = find_method("faast_paper", RECIPE, []).make_head(8, 3)
    assert isinstance(head, FastWeights)
    assert (head.in_features, head.out_features) == (8, 3)
    assert isinstance(head.regularization, PaperRule)


def test_one_pass_is_told_from_training():
    assert find_method("faast", RECIPE, []).learns_in_one_pass
    assert not find_method("faast", RECIPE, ["--method=null"]).learns_in_one_pass
    assert find_method(
        "faast", RECIPE, ["--method=null", "--trainer.max_epochs=0"]
    ).learns_in_one_pass  # nothing trains
    assert not find_method("faast", RECIPE, ["--method.epochs=2"]).learns_in_one_pass


def test_own_overlay(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: {head: {class_path: lightning_faast.FastWeights, init_args: {prior: uniform}}}\n")
    method = find_method(str(file), RECIPE, [])
    assert method.name == "mine"
    assert method.make_head(4, 2).prior == "uniform"


def test_unknown_method_lists_the_known():
    with pytest.raises(FileNotFoundError, match=r"'fast' is no method.*faast_paper"):
        find_method("fast", RECIPE, [])


def test_wrong_option_is_the_parsers_message(capsys):
    with pytest.raises(ValueError, match="limit_per_clas"):
        find_method("faast", RECIPE, ["--data.limit_per_clas=3"])
    assert capsys.readouterr().err == ""


def test_identity_knows_answers_from_places():
    same = [
        find_method("faast", RECIPE, ["--trainer.accelerator=cpu", "--data.num_workers=1", "--trainer.logger=false"]),
        find_method("faast", RECIPE, []),
    ]
    assert same[0].identity() == same[1].identity()
    assert find_method("faast", RECIPE, ["--model.head.prior=uniform"]).identity() != same[0].identity()
    assert find_method("faast", RECIPE, ["--data.batch_size=7"]).identity() != same[0].identity()  # decides training


def test_resolving_neither_seeds_nor_says_anything(capsys):
    torch.manual_seed(3)
    resolve(["--config", RECIPE])
    assert capsys.readouterr().out == ""
