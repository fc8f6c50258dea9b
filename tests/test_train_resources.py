"""Memory, optimizers for large batches, and waiting times of a training."""

import mmap

import pytest
import torch
from test_train import QUIET, assert_same, config
from trainings import PLAIN, train_interrupted, trained

from divqat._util import memory as system
from divqat._util.files import load_checkpoint
from divqat.train import TrainConfig, memory, objective, train

pytestmark = pytest.mark.slow


def test_the_error_for_a_too_large_batch_says_what_fits(vgg_teacher, tmp_path, monkeypatch):
    bytes_per_image = []
    check = memory.StepMemory.check

    def noted(step_memory):
        bytes_per_image.append(step_memory.bytes_per_image)
        check(step_memory)

    monkeypatch.setattr(memory.StepMemory, "check", noted)
    monkeypatch.setattr(memory, "free_memory", lambda device: 100 * 2**20)
    trained(vgg_teacher, tmp_path / "a", batch_size=1000, accumulate=4, epochs=2)
    # vgg_small saves between 100 KB and 1 MB per 8x8 image
    assert 1e5 < bytes_per_image[0] < 1e6
    for accumulate in (1, 2):
        with pytest.raises(MemoryError) as error:
            trained(vgg_teacher, tmp_path / "b", batch_size=1000, accumulate=accumulate, epochs=2)
        fits = f"enough for at most {100 * 2**20 // bytes_per_image[0]:,}"
        assert f"{1000 // accumulate:,} images at a time do not fit" in str(error.value)
        assert fits in str(error.value)
    assert not (tmp_path / "b" / "checkpoint.pt").exists()


def test_the_page_cache_of_a_container_counts_as_free(tmp_path, monkeypatch):
    monkeypatch.setattr(system, "CGROUP", tmp_path)
    free = system.free_memory(torch.device("cpu"))
    limit = min(free // 2, 2**30)  # less than the machine has
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{limit - 20}\n")
    assert system.free_memory(torch.device("cpu")) == 20
    (tmp_path / "memory.stat").write_text("anon 7\nfile 900\ninactive_file 500\nactive_file 400\n")
    assert system.free_memory(torch.device("cpu")) == 520
    (tmp_path / "memory.max").write_text("max\n")
    assert system.free_memory(torch.device("cpu")) > limit


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")]
)
def test_running_out_of_memory_says_what_fits(vgg_teacher, tmp_path, monkeypatch, error):
    def full(self, *args):
        raise error

    monkeypatch.setattr(objective.Objective, "loss_on_images", full)
    with pytest.raises(MemoryError, match=r"256 images at a time do not fit.*enough for at most"):
        trained(vgg_teacher, tmp_path)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["epoch"] == 0


def test_tensors_saved_for_the_backward_pass_are_counted_once():
    weight = torch.randn(8, 4, requires_grad=True)
    x = torch.randn(2, 4, requires_grad=True)
    # exp saves its output and the product its input; the weight does not count
    assert memory.saved_bytes(lambda: (x @ weight.T).exp(), [weight]) == 4 * (2 * 8 + 2 * 4)

    def twice():
        y = x.exp()  # saved by exp and by both squares
        return y.square() + y.square()

    assert memory.saved_bytes(twice, [x]) == 4 * 2 * 4


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "lamb"])
def test_every_optimizer_learns_resumes_and_follows_the_schedule(tmp_path, optimizer):
    lr = dict(sgd=0.05, lars=8.0, lamb=0.01)[optimizer]
    settings = TrainConfig(
        dataset="digits", model="lenet", batch_size=128, epochs=4, threads=1, lr=lr,
        optimizer=optimizer, lr_warmup_epochs=1,
    )  # fmt: skip
    train_interrupted(settings, tmp_path / "a", 2)
    summary = train(settings, tmp_path / "b", **QUIET)
    assert_same(tmp_path / "a", tmp_path / "b")
    assert summary["test_accuracy"] > 0.85
    group = load_checkpoint(tmp_path / "a" / "checkpoint.pt")["optimizer"]["param_groups"][0]
    assert float(group["lr"]) == pytest.approx(settings.learning_rate(4 * 11 - 1, 11))


def test_the_learning_rate_follows_the_batch():
    def peak(**settings):
        settings |= dict(schedule="cosine", lr_warmup_epochs=1)
        config = TrainConfig(batch_size=1024, lr=0.1, epochs=4, **settings)
        rates = [config.learning_rate(i, 10) for i in range(40)]
        assert rates.index(max(rates)) in (9, 10) and rates[0] == pytest.approx(max(rates) / 10)
        return max(rates)

    assert peak() == pytest.approx(0.1)
    assert peak(lr_scaling="linear") == pytest.approx(0.8)
    assert peak(lr_scaling="sqrt") == pytest.approx(0.1 * 8**0.5)
    assert peak(lr_scaling="linear", base_batch_size=512) == pytest.approx(0.2)


def test_a_run_reports_its_memory_and_its_waiting_time(vgg_teacher, tmp_path):
    lines = []
    settings = config(vgg_teacher, **{**PLAIN, "epochs": 2})
    summary = train(settings, tmp_path, log=lines.append)
    assert "of the training time waiting for images, peak memory" in lines[-1]
    assert "(full precision: " in lines[-1]
    assert 0 < summary["waiting"] < 1
    assert summary["peak_memory"] > 100 * 2**20


def test_the_peak_is_that_of_the_run():
    device = torch.device("cpu")
    system.reset_peak(device)
    low = system.peak_memory(device)
    with mmap.mmap(-1, 256 * 2**20) as pages:  # an allocator may keep those of a freed tensor
        for start in range(0, len(pages), mmap.PAGESIZE):
            pages[start] = 1
    assert system.peak_memory(device) > low + 200 * 2**20
    system.reset_peak(device)
    assert system.peak_memory(device) < low + 100 * 2**20
