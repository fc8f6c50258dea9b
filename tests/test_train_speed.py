"""Mixed precision, compilation and the teacher's kept answers change the speed, not the result."""

import pytest
import torch
from test_train import DIVQAT, QUIET, assert_same, config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from divqat.data import Decoder, ImageSet, StreamedSet, batches
from divqat.files import load_checkpoint, read_json
from divqat.options import ConfigError
from divqat.train import TrainConfig, answers, graph, load_run, loop, memory, step, train, trainer
from divqat.train.answers import digest, teacher_logits
from divqat.train.optimizer import build_optimizer

PLAIN = {**DIVQAT, "pad": 0, "epochs": 3}


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "fp"
    settings = dict(dataset="digits", model="vgg_small", batch_size=64, epochs=3, threads=1)
    train(TrainConfig(**settings), folder, **QUIET)
    return folder


def trained(teacher, folder, **changes):
    train(config(teacher, **{**PLAIN, "model": "vgg_small", **changes}), folder, **QUIET)
    return load_checkpoint(folder / "checkpoint.pt")


@pytest.fixture(scope="session")
def plain(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    trained(teacher, folder)
    return folder


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_learns_as_well(teacher, plain, tmp_path, precision):
    state = trained(teacher, tmp_path, precision=precision)
    for name, value in state["model"].items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            assert value.dtype == torch.float32, name  # weights, scales and statistics
    summaries = [read_json(folder / "summary.json") for folder in (plain, tmp_path)]
    accuracies = [s["test_accuracy"] for s in summaries]
    assert abs(accuracies[0] - accuracies[1]) < 0.03, accuracies
    assert state["rows"][-1]["divergence"] > 0
    other = load_checkpoint(plain / "checkpoint.pt")
    assert any(not torch.equal(a, b) for a, b in zip(
        state["model"].values(), other["model"].values(), strict=True
    ) if isinstance(a, torch.Tensor))  # fmt: skip
    assert bool(state["scaler"]) == (precision == "float16")


def test_steps_whose_scaled_gradients_overflow_are_skipped(teacher, tmp_path, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp,
        "GradScaler",
        lambda *args, **kwargs: scaler(*args, init_scale=2.0**100, **kwargs),
    )
    state = trained(teacher, tmp_path, precision="float16", epochs=2)
    assert state["scaler"]["scale"] == 2.0 ** (100 - 2 * 6)  # halved by each of 6 steps per epoch
    start = load_run(teacher).model
    for name, value in start.named_parameters():
        assert torch.equal(value, state["model"].get(name, value)), name


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_a_skipped_step_leaves_the_optimizer_as_it_was(device):
    """The first one, too; the others are those of SGD that is not fused."""
    settings = dict(lr=0.1, momentum=0.9, weight_decay=1e-3)
    generator = torch.Generator().manual_seed(0)
    start, *grads = (torch.randn(3, 2, 3, 3, generator=generator).to(device) for _ in range(5))
    start = start.contiguous(memory_format=torch.channels_last)
    theirs, ours = (start.clone().requires_grad_() for _ in range(2))
    plain = torch.optim.SGD([theirs], **settings, nesterov=True, foreach=False)
    fused = build_optimizer(TrainConfig(**settings), [ours], torch.device(device))
    scalers = [torch.amp.GradScaler(device, init_scale=4.0) for _ in range(2)]
    for i, grad in enumerate(grads):
        for parameter, optimizer, scaler in zip(
            (theirs, ours), (plain, fused), scalers, strict=True
        ):
            before = parameter.detach().clone()
            optimizer.zero_grad()
            scaler.scale((parameter * grad).sum()).backward()
            if i in (0, 2):
                parameter.grad[0, 0, 0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(parameter.detach(), before) == (i in (0, 2))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_an_interrupted_float16_run_ends_with_the_same_bits(teacher, tmp_path):
    settings = config(teacher, **{**PLAIN, "model": "vgg_small", "precision": "float16"})

    def log(line):
        if line.startswith("epoch 1/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "a", log=log)
    train(settings, tmp_path / "a", **QUIET)
    train(settings, tmp_path / "b", **QUIET)
    assert_same(tmp_path / "a", tmp_path / "b")


def test_a_compiled_run_is_the_same_within_rounding(teacher, tmp_path):
    whole = dict(batch_size=647, epochs=2)  # two steps per epoch, of one shape
    state = trained(teacher, tmp_path / "compiled", compile=True, **whole)
    other = trained(teacher, tmp_path / "eager", **whole)
    assert state["model"].keys() == other["model"].keys()
    rows = [s["rows"][0] for s in (state, other)]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-2)
    load_run(tmp_path / "compiled")


def test_the_teacher_is_asked_once(teacher, plain, tmp_path, monkeypatch):
    trained(teacher, tmp_path, cache_teacher=True)
    kept = load_checkpoint(tmp_path / answers.FILE)
    run = load_run(teacher)
    train_set = run.splits().train
    assert kept["logits"].shape == (len(train_set), 10)
    assert kept["key"]["teacher"] == run.fingerprint
    (images, _) = next(batches(train_set, 32))
    with torch.no_grad():
        wanted = run.model(images)
    torch.testing.assert_close(kept["logits"][:32], wanted, rtol=1e-4, atol=1e-4)
    rows = [load_checkpoint(f / "checkpoint.pt")["rows"] for f in (tmp_path, plain)]
    for a, b in zip(*rows, strict=True):
        assert a["divergence"] == pytest.approx(b["divergence"], rel=1e-2)

    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        raise AssertionError("asked again")

    monkeypatch.setattr(type(run.model), "forward", counted)
    again = teacher_logits(tmp_path, run.model, train_set, {
        "teacher": run.fingerprint, "precision": "float32"})  # fmt: skip
    assert torch.equal(again, kept["logits"]) and not calls


def labeled(images):
    return ImageSet(images, torch.zeros(len(images)).long())


def test_other_images_another_teacher_or_a_damaged_file_are_asked_again(tmp_path):
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    images = torch.randint(0, 256, (7, 3, 2, 2), dtype=torch.uint8)

    def ask(images, name="a"):
        return teacher_logits(tmp_path, teacher, labeled(images), {"teacher": name})

    first = ask(images)
    with torch.no_grad():
        teacher[1].weight.mul_(2)
    assert torch.equal(ask(images), first)  # the key is the same
    assert not torch.equal(ask(images, "b"), first)
    changed = images.clone()
    changed[3, 0, 0, 0] ^= 1
    assert torch.equal(ask(images, "b"), ask(images, "b"))
    kept = ask(changed, "b")
    assert not torch.equal(kept[3], ask(images, "b")[3])
    (tmp_path / answers.FILE).write_bytes(b"damaged")
    assert torch.equal(ask(changed, "b"), kept)
    others = images, changed, images.view(7, 3, 4, 1)
    assert len({digest(labeled(other)) for other in others}) == 3
    streamed = StreamedSet(
        [str(tmp_path / answers.FILE)], torch.zeros(1).long(), Decoder(str, (3, 2, 2))
    )
    before = digest(streamed)
    (tmp_path / answers.FILE).write_bytes(b"damaged again")
    assert digest(streamed) != before


def test_kept_answers_and_augmentation_exclude_each_other():
    for changes in (dict(pad=1), dict(flip=True)):
        with pytest.raises(ConfigError, match="cache_teacher: wanted images that are the same"):
            TrainConfig(cache_teacher=True, **changes)
    with pytest.raises(ConfigError, match="precision: wanted one of float32, bfloat16, float16"):
        TrainConfig(precision="int8")


plays = []


class Tape(TorchDispatchMode):
    """What a CUDA graph is, on the CPU: operations on fixed memory, played without Python.

    Unlike a graph it runs the operations while it takes them down, so it begins by keeping what
    they overwrite, and puts it back.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.made = [], {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        reads = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        for tensor in reads:
            key = tensor.untyped_storage().data_ptr()
            if key not in self.made and key not in self.before:
                whole = tensor.detach().as_strided(
                    (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0
                )
                self.before[key] = whole, whole.clone()
        output = func(*args, **kwargs)
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.made.add(tensor.untyped_storage().data_ptr())
        self.calls.append((func, args, kwargs, output))
        return output

    @torch.inference_mode()  # which may write to what was made in it, and to anything else
    def play(self):
        plays.append(1)
        for func, args, kwargs, outputs in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(outputs), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def tape(function):
    """Stands for :func:`divqat.train.graph.cuda_graph`."""
    recorded = Tape()
    with recorded:
        output = function()
    for whole, kept in recorded.before.values():
        whole.copy_(kept)
    return output, recorded.play


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(precision="float16"),
        dict(method="qat", accumulate=2),
        dict(save_as_codes=True),
        dict(cache_teacher=True),
    ],
    ids=["divqat", "float16", "accumulate", "codes", "cached"],
)
def test_a_replayed_step_is_the_step_bit_for_bit(teacher, tmp_path, monkeypatch, changes):
    """Observers' buffers, momentum, the rise of λ and the learning rate included."""
    settings = dict(epochs=4, freeze_observers_epoch=3, freeze_batchnorm_epoch=4, **changes)
    if changes.get("method") == "qat":
        settings["weight"] = 0.0
    trained(teacher, tmp_path / "eager", **settings)

    class Replaying(trainer.Trainer):
        def __init__(self, *args):
            super().__init__(*args)
            self.do_step = graph.Captured(self.step, tape)

    monkeypatch.setattr(loop, "Trainer", Replaying)
    plays.clear()
    trained(teacher, tmp_path / "replayed", **settings)
    # 5 full steps per epoch; three to warm up whenever something has been frozen
    assert len(plays) == 3 * 5 + 5 - 3 * 3
    assert_same(tmp_path / "eager", tmp_path / "replayed")


def test_activations_kept_as_codes_change_no_bit(teacher, plain, tmp_path):
    trained(teacher, tmp_path, save_as_codes=True)
    assert_same(tmp_path, plain)
    for settings in (dict(method="qat", teacher="a", compile=True), dict(method="fp")):
        with pytest.raises(ConfigError, match="save_as_codes: wanted qat or divqat without"):
            TrainConfig(save_as_codes=True, **settings)


def test_a_graph_wants_a_gpu_and_one_process(teacher, tmp_path):
    with pytest.raises(ConfigError, match="cuda_graph: wanted one process on a GPU, got 1 on"):
        trained(teacher, tmp_path, cuda_graph=True, device="cpu")
    with pytest.raises(ConfigError, match="cuda_graph: wanted one process on a GPU, got 2 on"):
        TrainConfig(cuda_graph=True).check_team(2)
    with pytest.raises(ConfigError, match="cuda_graph: wanted optimizer sgd"):
        TrainConfig(cuda_graph=True, optimizer="lamb")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_cuda_graph(teacher, tmp_path, precision):
    settings = dict(precision=precision, device="cuda", deterministic=True)
    trained(teacher, tmp_path / "eager", **settings)
    trained(teacher, tmp_path / "graph", cuda_graph=True, **settings)
    states = [load_checkpoint(tmp_path / f / "checkpoint.pt") for f in ("eager", "graph")]
    for name, value in states[0]["model"].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, states[1]["model"][name]), name


class HostReads(TorchDispatchMode):
    READS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().split("::")[-1].split(".")[0] in self.READS:
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", ["fp", "qat", "divqat"])
def test_a_step_reads_nothing_on_the_host(teacher, tmp_path, monkeypatch, method, precision):
    seen, original = [], step.Step.__call__

    def watched(self, *args, **kwargs):
        with HostReads() as reads:
            result = original(self, *args, **kwargs)
        seen.append(reads.seen)
        return result

    monkeypatch.setattr(step.Step, "__call__", watched)
    if method == "fp":
        plain = dict(dataset="digits", model="lenet", epochs=1, threads=1, grad_clip=5.0)
        train(TrainConfig(**plain, precision=precision), tmp_path, **QUIET)
    else:
        own = dict(weight=0.0) if method == "qat" else {}
        trained(teacher, tmp_path, method=method, precision=precision, grad_clip=5.0, **own)
    assert len(seen) > 3 and not any(seen)
    with HostReads() as reads:
        torch.ones(()).item()
    assert reads.seen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_step_does_not_wait_for_the_gpu(teacher, tmp_path, monkeypatch, precision):
    original = step.Step.__call__

    def strict(self, *args, **kwargs):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return original(self, *args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(step.Step, "__call__", strict)
    trained(teacher, tmp_path, precision=precision, device="cuda", cache_teacher=True)


def test_a_batch_that_cannot_fit_is_refused_with_what_would(teacher, tmp_path, monkeypatch):
    each = []
    check = memory.Need.check

    def noted(need):
        each.append(need.each)
        check(need)

    monkeypatch.setattr(memory.Need, "check", noted)
    monkeypatch.setattr(memory, "free_memory", lambda device: 100 * 2**20)
    trained(teacher, tmp_path / "a", batch_size=1000, accumulate=4, epochs=2)
    # vgg_small on 8x8 images keeps between 100 KB and 1 MB of each
    assert 1e5 < each[0] < 1e6
    for accumulate in (1, 2):
        with pytest.raises(MemoryError) as error:
            trained(teacher, tmp_path / "b", batch_size=1000, accumulate=accumulate, epochs=2)
        fits = f"enough for about {100 * 2**20 // each[0]:,}"
        assert f"{1000 // accumulate:,} images at a time do not fit" in str(error.value)
        assert fits in str(error.value)
    assert not (tmp_path / "b" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")]
)
def test_running_out_of_memory_says_what_fits(teacher, tmp_path, monkeypatch, error):
    def full(self, *args):
        raise error

    monkeypatch.setattr(step.Step, "losses", full)
    with pytest.raises(MemoryError, match=r"256 images at a time do not fit.*enough for about"):
        trained(teacher, tmp_path)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == 0


def test_what_is_kept_for_the_backward_pass_is_counted():
    weight = torch.randn(8, 4, requires_grad=True)
    x = torch.randn(2, 4, requires_grad=True)
    # exp keeps its output and the product its input, but the weight is there anyway
    assert memory.saved_bytes(lambda: (x @ weight.T).exp(), [weight]) == 4 * (2 * 8 + 2 * 4)

    def twice():
        y = x.exp()  # kept by exp and by both squares
        return y.square() + y.square()

    assert memory.saved_bytes(twice, [x]) == 4 * 2 * 4


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "lamb"])
def test_every_optimizer_learns_resumes_and_follows_the_schedule(tmp_path, optimizer):
    lr = dict(sgd=0.05, lars=8.0, lamb=0.01)[optimizer]
    settings = TrainConfig(
        dataset="digits", model="lenet", batch_size=128, epochs=4, threads=1, lr=lr,
        optimizer=optimizer, lr_warmup_epochs=1,
    )  # fmt: skip

    def stop(line):
        if line.startswith("epoch 2/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "a", log=stop)
    train(settings, tmp_path / "a", **QUIET)
    summary = train(settings, tmp_path / "b", **QUIET)
    assert_same(tmp_path / "a", tmp_path / "b")
    assert summary["test_accuracy"] > 0.85
    group = load_checkpoint(tmp_path / "a" / "checkpoint.pt")["optimizer"]["param_groups"][0]
    assert float(group["lr"]) == pytest.approx(settings.learning_rate(4 * 11 - 1, 11))


def test_the_learning_rate_follows_the_batch():
    def peak(**settings):
        config = TrainConfig(batch_size=1024, lr=0.1, epochs=4, lr_warmup_epochs=1, **settings)
        rates = [config.learning_rate(i, 10) for i in range(40)]
        assert rates.index(max(rates)) in (9, 10) and rates[0] == pytest.approx(max(rates) / 10)
        return max(rates)

    assert peak() == pytest.approx(0.1)
    assert peak(lr_scaling="linear") == pytest.approx(0.8)
    assert peak(lr_scaling="sqrt") == pytest.approx(0.1 * 8**0.5)
    assert peak(lr_scaling="linear", base_batch_size=512) == pytest.approx(0.2)


def test_a_run_tells_its_memory_and_its_wait(teacher, tmp_path):
    lines = []
    settings = config(teacher, **{**PLAIN, "model": "vgg_small", "epochs": 2})
    summary = train(settings, tmp_path, log=lines.append)
    assert "of the steps' time waiting for images, peak memory" in lines[-1]
    assert "(full precision: " in lines[-1]
    assert 0 < summary["waiting"] < 1
    assert summary["peak_memory"] > 100 * 2**20


def test_the_peak_is_that_of_the_run():
    device = torch.device("cpu")
    memory.reset_peak(device)
    low = memory.peak_memory(device)
    torch.ones(64 * 2**20)
    assert memory.peak_memory(device) > low + 200 * 2**20
    memory.reset_peak(device)
    assert memory.peak_memory(device) < low + 100 * 2**20
