"""The cache of the teacher's logits in the run folder."""

import pytest
import torch
from trainings import trained

from divqat._util.files import load_checkpoint
from divqat._util.settings import ConfigError
from divqat.data import Decoder, ImageSet, StreamedSet, batches
from divqat.data.digest import digest
from divqat.train import TrainConfig, answers, load_run
from divqat.train.answers import teacher_logits


@pytest.mark.slow
def test_the_teacher_runs_once(vgg_teacher, vgg_divqat, tmp_path, monkeypatch):
    trained(vgg_teacher, tmp_path, cache_teacher=True)
    kept = load_checkpoint(tmp_path / answers.FILE)
    run = load_run(vgg_teacher)
    train_set = run.splits().train
    assert kept["logits"].shape == (len(train_set), 10)
    assert kept["key"]["teacher"] == run.fingerprint
    (images, _) = next(batches(train_set, 32))
    with torch.no_grad():
        wanted = run.model(images)
    torch.testing.assert_close(kept["logits"][:32], wanted, rtol=1e-4, atol=1e-4)
    rows = [load_checkpoint(f / "checkpoint.pt")["rows"] for f in (tmp_path, vgg_divqat)]
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


def test_other_images_another_teacher_or_a_damaged_file_renew_the_cache(tmp_path):
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


def test_cached_logits_and_augmentation_exclude_each_other():
    for changes in (dict(pad=1), dict(flip=True)):
        with pytest.raises(ConfigError, match="cache_teacher: wanted images that are the same"):
            TrainConfig(cache_teacher=True, **changes)
    with pytest.raises(ConfigError, match="precision: wanted one of float32, bfloat16, float16"):
        TrainConfig(precision="int8")
