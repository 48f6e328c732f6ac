"""What every head that learns class labels in one pass keeps to, whichever it is."""

import copy
import io
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_faast.associative import (
    KNN,
    Learner,
    LinearAttentionMemory,
    LinearDiscriminant,
    LogisticRegression,
    Memory,
    NearestClassMean,
    SoftmaxMemory,
    WeightedKNN,
)
from lightning_faast.callback import FaastCallback
from tests.associative.oracles import blobs, relative
from tests.associative.test_fast_weights import Group

N, D, C = 120, 6, 4
MEMORIES = {
    "knn": KNN,
    "knn_weighted": WeightedKNN,
    "softmax": SoftmaxMemory,
    "bounded": partial(KNN, max_rows=50),
    "linear_attention": LinearAttentionMemory,
    "knn_embeddings": partial(KNN, class_embeddings=torch.randn(C, 3, generator=torch.Generator().manual_seed(1))),
    "softmax_embeddings": partial(
        SoftmaxMemory, class_embeddings=torch.randn(C, 3, generator=torch.Generator().manual_seed(1))
    ),
}
LINEAR = {
    "nearest_class_mean": NearestClassMean,
    "lda": LinearDiscriminant,
    "logistic": partial(LogisticRegression, strengths=[0.1, 1.0]),
}
HEADS = {**MEMORIES, **LINEAR}
each_head = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)


def data(dtype=torch.float32):
    return blobs(N, D, C, dtype=dtype)


def fitted(make, dtype=torch.float32, **options):
    keys, labels = data(dtype)
    return make(D, C, **options).fit(keys, labels), keys, labels


# ---------------------------------------------------------------------- learning


@each_head
def test_learns(make):
    model, keys, labels = fitted(make)
    assert isinstance(model, Learner)
    assert model.rows == N
    assert (model.in_features, model.out_features) == (D, C)
    assert model.score(keys, labels) > 0.6
    probabilities = model.predict_proba(keys)
    assert relative(probabilities.sum(1), torch.ones(N)) < 1e-6
    assert torch.equal(model.predict(keys), probabilities.argmax(1))
    assert bool(model(keys).isfinite().all())
    assert model(keys.reshape(2, 60, D)).shape == (2, 60, C)
    assert model(keys[:0]).shape == (0, C)
    assert model.summary()
    assert all(isinstance(value, float) for value in model.figures().values())


@each_head
@pytest.mark.parametrize("size", [1, 33, N])
def test_batches_of_any_size(make, size):
    model, keys, labels = fitted(make)
    streamed = make(D, C)
    for part in zip(keys.split(size), labels.split(size), strict=True):
        streamed.update(*part)
    streamed.solve()
    assert relative(streamed(keys), model(keys)) < 1e-6


@each_head
def test_sizes_are_inferred(make):
    model, keys, labels = fitted(make)
    inferred = make()
    inferred.fit(keys, labels)
    assert (inferred.in_features, inferred.out_features) == (D, C)
    assert torch.equal(inferred(keys), model(keys))


@each_head
def test_the_target_may_be_a_column(make):
    model, keys, labels = fitted(make)
    assert torch.equal(make(D, C).fit(keys, labels[:, None].int())(keys), model(keys))


@each_head
def test_reset_forgets_rows_and_keeps_the_solution(make):
    model, keys, labels = fitted(make)
    before = model(keys)
    model.reset()
    assert model.rows == 0
    assert torch.equal(model(keys), before)
    with pytest.raises(RuntimeError, match="No rows were seen"):
        model.solve()
    model.update(keys[:60], labels[:60])
    assert torch.equal(model(keys), before), "until the next solve"
    model.solve()
    assert not torch.equal(model(keys), before)


@each_head
def test_the_callers_tensors_are_not_kept(make):
    keys, labels = data()
    model, other = make(D, C), make(D, C).fit(keys, labels)
    mine, theirs = keys.clone(), labels.clone()
    model.update(mine, theirs)
    mine.zero_(), theirs.zero_()
    model.solve()
    assert torch.equal(model(keys), other(keys))


# ---------------------------------------------------------------------- bad input


@each_head
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_keys_that_are_no_numbers(make, value):
    keys, labels = data()
    model = make(D, C)
    model.update(keys, labels)
    bad = keys.clone()
    bad[3, 2] = value
    with pytest.raises(ValueError, match=r"Batch 1 .*NaN or infinite"):
        model.update(bad, labels)
    assert model.rows == N, "nothing of the bad batch was added"


@each_head
@pytest.mark.parametrize("label", [-1, C])
def test_labels_out_of_range(make, label):
    keys, labels = data()
    labels[5] = label
    with pytest.raises(ValueError, match=rf"outside \[0, {C}\)"):
        make(D, C).update(keys, labels)


@each_head
def test_wrong_shapes_and_types(make):
    keys, labels = data()
    model = make(D, C)
    with pytest.raises(ValueError, match="width 6"):
        model.update(keys[:, :4], labels)
    with pytest.raises(ValueError, match="learns class labels"):
        model.update(keys, torch.nn.functional.one_hot(labels))
    with pytest.raises(ValueError, match="learns class labels"):
        model.update(keys, labels.float())
    with pytest.raises(ValueError, match="learns class labels"):
        model.update(keys, labels[:10])
    with pytest.raises(ValueError, match="floating point"):
        model.update(labels[:, None], labels)
    with pytest.raises(TypeError, match=r"torch\.Tensor"):
        model.update(keys.numpy(), labels)
    assert model.rows == 0
    model.update(keys[:0], labels[:0])
    assert model.rows == 0
    model.fit(keys, labels)
    with pytest.raises(ValueError, match=r"keys must be \[..., 6\]"):
        model(keys[:, :4])


def test_a_label_that_is_an_identifier():
    keys, labels = data()
    labels[0] = 10**12
    for make in HEADS.values():
        model = make()
        with pytest.raises(ValueError, match="label"):
            model.update(keys, labels)


@each_head
def test_keys_to_answer_that_are_no_numbers(make):
    model, keys, _ = fitted(make)
    queries = keys[:3].clone()
    queries[1, 0] = float("nan")
    logits = model(queries)
    assert bool(logits[1].isnan().all())
    assert torch.allclose(logits[[0, 2]], model(keys[[0, 2]]), rtol=1e-5)


@pytest.mark.parametrize("make", MEMORIES.values(), ids=MEMORIES)
def test_memories_take_no_weights(make):
    keys, labels = data()
    with pytest.raises(ValueError, match="repeat rows"):
        make(D, C).update(keys, labels, torch.ones(N))


@pytest.mark.parametrize("make", LINEAR.values(), ids=LINEAR)
def test_linear_heads_refuse_class_embeddings(make):
    with pytest.raises(ValueError, match="learns labels and has no use for class_embeddings"):
        make(D, C, class_embeddings=torch.eye(C))


@pytest.mark.parametrize("make", LINEAR.values(), ids=LINEAR)
def test_linear_heads_need_every_class(make):
    keys, labels = data()
    with pytest.raises(ValueError, match="1 of 5 classes without a row: 4"):
        make(D, C + 1).fit(keys, labels)


@each_head
def test_unfitted(make):
    keys, labels = data()
    model = make(D, C)
    assert torch.equal(model(keys), torch.zeros(N, C)), "a pass runs the head before it is solved"
    for call in (model.predict, model.predict_proba):
        with pytest.raises(RuntimeError, match="is not fitted"):
            call(keys)
    with pytest.raises(RuntimeError, match="is not fitted"):
        model.score(keys, labels)
    with pytest.raises(RuntimeError, match=r"fitted|solved"):
        model.summary()
    with pytest.raises(RuntimeError, match="No rows were seen"):
        model.solve()
    if make not in (MEMORIES["knn_embeddings"], MEMORIES["softmax_embeddings"]):
        with pytest.raises(RuntimeError, match="is not fitted"):
            make()(keys)


def test_sizes_must_be_positive():
    with pytest.raises(ValueError, match="in_features must be at least 1"):
        KNN(0, 3)


# ---------------------------------------------------------------------- state


@each_head
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_state_dict(make, dtype):
    model, keys, _ = fitted(make, dtype)
    state = model.state_dict()
    for other in (
        make(D, C),
        make(D, C).fit(*blobs(70, D, C, seed=3, dtype=torch.float32)),
        make(),
        copy.deepcopy(model),
    ):
        other.load_state_dict(state)
        assert torch.equal(other(keys), model(keys))
        assert (other.in_features, other.out_features) == (D, C)
        assert other.rows == 0
        assert other.bytes_to_predict == model.bytes_to_predict
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True)


@each_head
def test_state_dict_of_other_sizes(make):
    state = fitted(make)[0].state_dict()
    wide = make(D + 1, C)
    with pytest.raises(RuntimeError, match=f"in_features: {D} in the state, {D + 1} declared"):
        wide.load_state_dict(state)
    assert torch.equal(wide(torch.zeros(2, D + 1)), torch.zeros(2, C)), "nothing was loaded"


@each_head
def test_an_unfitted_state_loads(make):
    keys, _ = data()
    model = make(D, C)
    model.load_state_dict(make(D, C).state_dict())
    assert torch.equal(model(keys), torch.zeros(N, C))


@each_head
def test_learned_state_learns_on(make):
    model, keys, labels = fitted(make)
    first, second = make(D, C), make(D, C)
    first.update(keys[:50], labels[:50])
    second.load_learned_state(first.learned_state())
    assert second.rows == 50
    second.update(keys[50:], labels[50:])
    second.solve()
    assert second.rows == N
    assert second.bytes_to_update == model.bytes_to_update
    assert relative(second(keys), model(keys)) < 1e-6


@each_head
def test_a_learned_state_of_something_else(make):
    model = make(D, C)
    model.update(*data())
    state = model.learned_state()
    for other in (make(D + 1, C), make(D, C - 1) if "class_embeddings" not in getattr(make, "keywords", {}) else None):
        if other is not None:
            with pytest.raises(ValueError, match=r"state (has|holds)"):
                other.load_learned_state(state)
    state.popitem()
    with pytest.raises(ValueError, match=r"Not (a|the) state"):
        make(D, C).load_learned_state(state)


@each_head
def test_an_empty_learned_state(make):
    keys, labels = data()
    model = make(D, C)
    model.load_learned_state(make(D, C).learned_state())
    assert model.rows == 0
    model.update(keys, labels)
    model.solve()


@each_head
def test_half_precision_and_autocast(make):
    model, keys, labels = fitted(make)
    with torch.autocast("cpu", torch.bfloat16):
        accuracy = model.score(keys, labels)
    assert accuracy == pytest.approx(model.score(keys, labels), abs=0.05)
    half = copy.deepcopy(model).half()
    assert half.score(keys, labels) == pytest.approx(model.score(keys, labels), abs=0.05)


# ---------------------------------------------------------------------- over processes


@each_head
@pytest.mark.parametrize("cuts", [(40, 120), (0, 120), (120, 120), (1, 90)])
def test_processes_learn_what_one_would(make, cuts):
    keys, labels = data()
    positions = torch.arange(N)
    one = make(D, C)
    one.update(keys, labels, positions=positions)
    one.solve()
    models = [make(D, C) for _ in range(3)]
    for model, i, j in zip(reversed(models), (0, *cuts), (*cuts, N), strict=True):
        if i < j:
            model.update(keys[i:j], labels[i:j], positions=positions[i:j])
    for future in Group(3).run(models):
        future.result()
    for model in models:
        model.solve()
        assert model.rows == N
        assert relative(model(keys), one(keys)) < 1e-6
        assert model.bytes_to_update == one.bytes_to_update
        for name, published in one.state_dict().items():
            assert relative(model.state_dict()[name], published) < 1e-6, name


@each_head
def test_processes_that_saw_nothing_at_all(make):
    models = [make(D, C), make(D, C)]
    for future in Group(2).run(models):
        future.result()
    with pytest.raises(RuntimeError, match="No rows were seen"):
        models[0].solve()


@each_head
def test_processes_whose_keys_differ_in_width(make):
    keys, labels = data()
    models = [make(None, C), make(None, C)]
    models[0].update(keys, labels)
    models[1].update(keys[:, :4], labels)
    for future in Group(2).run(models):
        with pytest.raises(ValueError, match="Processes hold"):
            future.result()


# ---------------------------------------------------------------------- in Lightning


class Net(LightningModule):
    def __init__(self, head):
        super().__init__()
        self.body = nn.Linear(D, 16).requires_grad_(False)
        nn.init.orthogonal_(self.body.weight)
        self.head = head

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", (self.head(self.body(batch[0])).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters())


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@each_head
def test_checkpoint_of_a_pass(make, tmp_path):
    keys, labels = data()
    loader = DataLoader(TensorDataset(keys, labels), batch_size=32)
    callback = FaastCallback(save_statistics=True)
    first = Trainer(callbacks=[callback], max_epochs=1, **QUIET)
    net = Net(make(16, C))
    first.fit(net, loader, loader)
    assert callback.metrics["faast/rows"] == N
    assert callback.metrics["faast/bytes_to_predict"] == net.head.bytes_to_predict
    accuracy = first.callback_metrics["accuracy"]
    assert accuracy > 0.6
    first.save_checkpoint(tmp_path / "solved.ckpt")
    state = torch.load(tmp_path / "solved.ckpt", weights_only=True)

    # a fresh module, by its state_dict alone
    fresh = Net(make(16, C))
    fresh.load_state_dict(state["state_dict"])
    (measured,) = Trainer(**QUIET).validate(fresh, loader, verbose=False)
    assert measured["accuracy"] == pytest.approx(float(accuracy))

    # more rows are learnt on top of the statistics in the checkpoint
    name = next(key for key in state["callbacks"] if "FaastCallback" in key)
    head = make(16, C)
    head.load_learned_state(state["callbacks"][name]["statistics"])
    assert head.rows == N
    head.solve()
    inputs = net.body(keys)
    assert relative(head(inputs), net.head(inputs)) < 1e-6


class SaveAfter(Callback):
    """A checkpoint in the middle of the pass."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            trainer.save_checkpoint(self.path)


@each_head
def test_a_pass_goes_on_in_its_middle(make, tmp_path):
    path = tmp_path / "half.ckpt"
    whole = Net(make(16, C))

    def loader():
        return StatefulDataLoader(TensorDataset(*data()), batch_size=32)

    Trainer(callbacks=[FaastCallback(save_statistics=True), SaveAfter(path)], max_epochs=1, **QUIET).fit(
        whole, loader()
    )
    resumed, callback = Net(make(16, C)), FaastCallback(save_statistics=True)
    Trainer(callbacks=[callback], max_epochs=1, **QUIET).fit(resumed, loader(), ckpt_path=path)
    assert callback.metrics["faast/rows"] == N
    inputs = whole.body(data()[0])
    assert relative(resumed.head(inputs), whole.head(inputs)) < 1e-6


def test_memory_is_the_base_of_all_readers():
    for make in (KNN, WeightedKNN, SoftmaxMemory, LinearAttentionMemory):
        assert issubclass(make, Memory)
        assert make(D, C).fit(*data()).num_solved == 0
    assert NearestClassMean(D, C).fit(*data()).num_solved == C * D + C
