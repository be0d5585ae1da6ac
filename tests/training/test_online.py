"""Pictures read in every step: as cached features, varied where asked, counted where broken, and trained on."""

import dataclasses
import io
import json
import tarfile

import pytest
import torch

from blip2.data.shards import write_manifest, write_split
from blip2.errors import BadData, BadRecipe, MissingFile
from blip2.training import sources
from blip2.training.loop import train
from blip2.training.optimizer import encoder_depths, parameter_groups
from blip2.training.progress import TIMING, read_metrics
from blip2.training.recipe import apply_overrides
from blip2.training.state import MODEL, newest_checkpoint

from .tiny_blip2 import build_in, make_parts, picture, tiny_recipe


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    make_parts(folder)
    return folder


def recipe_of(root, stage, *settings):
    plain = ["data.mixture.0.num_views=1", "data.image_token_share=1.0", "training.log_every=1"]
    return apply_overrides(tiny_recipe(root, stage, steps=4), [*plain, *settings])


def lines(root, recipe, run_dir):
    summary = train(build_in(root, recipe, run_dir), recipe, run_dir)
    assert summary.finished
    return [
        {name: value for name, value in line.items() if name not in TIMING}
        for line in read_metrics(run_dir)
        if line["kind"] == "train"
    ]


@pytest.mark.parametrize("stage", ["stage1", "stage2", "instruct"])
def test_plain_pictures_read_in_every_step_give_the_run_of_cached_features(root, tmp_path, stage):
    """The cache keeps float16, so the two agree to that."""
    cached = lines(root, recipe_of(root, stage), tmp_path / "cached")
    online = recipe_of(root, stage, "data.cache_features=false", "data.augment=false")
    for one, other in zip(cached, lines(root, online, tmp_path / "online"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=5e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", ["stage1", "stage2", "instruct"])
def test_exact_features_give_the_same_bits_cached_and_read_in_every_step(root, tmp_path, stage, precision):
    exact = ("data.exact_features=true", "data.augment=false", f"training.precision={precision}")
    cached = lines(root, recipe_of(root, stage, *exact), tmp_path / "cached")
    assert lines(root, recipe_of(root, stage, *exact, "data.cache_features=false"), tmp_path / "online") == cached
    trained = [(newest_checkpoint(tmp_path / run) / MODEL).read_bytes() for run in ("cached", "online")]
    assert trained[0] == trained[1]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_varied_pictures_are_the_same_for_any_number_of_workers(root, tmp_path, workers):
    settings = ("data.cache_features=false", "data.mixture.0.flip=true")
    expected = lines(root, recipe_of(root, "stage1", *settings, "data.num_workers=2"), tmp_path / "two")
    assert lines(root, recipe_of(root, "stage1", *settings, f"data.num_workers={workers}"), tmp_path / "n") == expected


def spoilt_parts(tmp_path, broken):
    make_parts(tmp_path)
    folder = tmp_path / "pictures"
    samples = [picture(number) for number in range(12)]

    for number in broken:
        samples[number] = dataclasses.replace(samples[number], image=samples[number].image[:60])
    write_manifest(folder, "pictures", {"train": write_split(folder, "train", samples)})
    return tmp_path


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "online"])
def test_broken_pictures_are_counted_and_named_and_others_stand_in(tmp_path, cached):
    root = spoilt_parts(tmp_path / "parts", [3, 7]) if (tmp_path / "parts").mkdir() is None else None
    settings = (f"data.cache_features={str(cached).lower()}", "data.stop_share=1.0", "training.steps=12")
    recipe = recipe_of(root, "stage1", *settings)
    assert len(lines(root, recipe, tmp_path / "run")) == 12
    named = [json.loads(line)["sample"] for line in (tmp_path / "run" / "faults.jsonl").read_text().splitlines()]
    assert {"3", "7"} <= set(named)


def test_a_broken_picture_is_told_alike_when_features_are_made_and_when_they_are_there(tmp_path):
    (tmp_path / "parts").mkdir()
    root = spoilt_parts(tmp_path / "parts", [3, 7])
    told = []
    for run_dir in (tmp_path / "cold", tmp_path / "warm"):
        recipe = recipe_of(root, "stage1", "data.stop_share=1.0", "training.steps=6", "data.mixture.0.num_views=3")
        job = build_in(root, recipe, run_dir)
        assert (job.faults.num_seen, job.faults.num_faults) == (24, 2), "12 pictures and as many texts, two are broken"
        train(job, recipe, run_dir)
        told.append(sorted((run_dir / "faults.jsonl").read_text().splitlines()))
    assert told[0] == told[1] and len(told[0]) == 2
    for line, sample in zip(map(json.loads, told[0]), ("3", "7"), strict=True):
        assert line["sample"] == sample and "train-00000.tar" in line["where"]
        assert "broken" in line["reason"] and sample not in line["reason"]


def test_a_picture_that_had_no_text_when_features_were_made_is_used_once_it_has(tmp_path):
    make_parts(tmp_path / "parts") if (tmp_path / "parts").mkdir() is None else None
    (tmp_path / "own").mkdir()
    for number in range(4):
        (tmp_path / "own" / f"{number}.png").write_bytes(picture(number).image)
        (tmp_path / "own" / f"{number}.txt").write_text("a cup" if number else "")
    settings = [f"data.mixture=[{{source: {tmp_path / 'own'}}}]", "data.stop_share=1.0", "training.batch_size=2"]
    recipe = recipe_of(tmp_path / "parts", "stage1")
    recipe = apply_overrides(recipe, settings)
    assert build_in(tmp_path / "parts", recipe, tmp_path / "one").faults.num_faults == 1, "it has no caption"
    (tmp_path / "own" / "0.txt").write_text("a star")
    job = build_in(tmp_path / "parts", recipe, tmp_path / "two")
    summary = train(job, recipe, tmp_path / "two")
    assert summary.finished and job.faults.num_faults == 0


def test_a_run_stops_when_too_many_pictures_are_broken(tmp_path):
    (tmp_path / "parts").mkdir()
    root = spoilt_parts(tmp_path / "parts", range(0, 12, 2))
    recipe = recipe_of(root, "stage1", "data.cache_features=false", "training.steps=200")
    with pytest.raises(BadData, match=r"samples are bad|in a row"):
        lines(root, recipe, tmp_path / "run")


def test_the_encoder_learns_where_it_may_and_slower_the_deeper(root, tmp_path):
    settings = ("data.cache_features=false", "model.train_vision=true", "optimizer.layer_decay=0.5")
    recipe = recipe_of(root, "stage1", *settings)
    job = build_in(root, recipe, tmp_path)
    network = job.module.model.vision_model.network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    train(job, recipe, tmp_path)
    changed = [name for name, value in network.state_dict().items() if not torch.equal(value, before[name])]
    assert any("layers.0" in name for name in changed)
    shares = {group["layer_share"] for group in parameter_groups(job.module, 0.05, 0.5)}
    depths = set(encoder_depths(job.module).values())
    assert shares == {1.0} | {0.5**depth for depth in depths} and len(depths) > 1


def test_a_frozen_encoder_in_the_step_does_not_change(root, tmp_path):
    recipe = recipe_of(root, "stage1", "data.cache_features=false")
    job = build_in(root, recipe, tmp_path)
    before = {name: value.clone() for name, value in job.module.model.vision_model.state_dict().items()}
    train(job, recipe, tmp_path)
    after = job.module.model.vision_model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_settings_that_contradict_each_other_are_refused(root):
    with pytest.raises(BadRecipe, match="train_vision changes the image features"):
        recipe_of(root, "stage1", "model.train_vision=true")
    with pytest.raises(BadRecipe, match="exact_features is for a frozen encoder"):
        settings = ("data.cache_features=false", "data.exact_features=true", "model.train_vision=true")
        recipe_of(root, "stage1", *settings)
    with pytest.raises(BadRecipe, match="image_token_share draws among cached features"):
        recipe_of(root, "stage1", "data.cache_features=false", "data.image_token_share=0.5")


def spoilt_archive(path, count=300, corrupt=(20, 120, 220), silent=(50,)):
    """A WebDataset shard with some broken pictures and empty captions, cut off in the middle of its last picture."""
    with tarfile.open(path, "w") as archive:
        for number in range(count):
            sample = picture(number % 12)
            image = sample.image[:60] if number in corrupt else sample.image
            caption = "" if number in silent else f"{sample.captions[0]} {number}"
            for suffix, data in (("png", image), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(data)
                last = archive.offset
                archive.addfile(member, io.BytesIO(data))
    # the archive ends within the text of the last sample but one, as a broken download does
    with path.open("r+b") as file:
        file.truncate(last - 512)
    return {f"{number:04d}" for number in (*corrupt, *silent)}


def test_bad_samples_of_a_whole_epoch_are_named_exactly(root, tmp_path):
    bad = spoilt_archive(tmp_path / "pairs-00000.tar")
    source = f"webdataset:{tmp_path / 'pairs-00000.tar'}"
    recipe = recipe_of(
        root,
        "stage1",
        f"data.mixture=[{{source: '{source}'}}]",
        "data.cache_features=false",
        "training.steps=75",
        "training.batch_size=4",
    )
    assert len(lines(root, recipe, tmp_path / "run")) == 75
    named = [json.loads(line) for line in (tmp_path / "run" / "faults.jsonl").read_text().splitlines()]
    samples = {fault["sample"] for fault in named if fault["sample"].rsplit("/", 1)[-1] in bad}
    damage = [fault for fault in named if fault["sample"].rsplit("/", 1)[-1] not in bad]
    assert len(samples) == len(bad) and len(named) == len(bad) + len(damage)
    assert damage and all("pairs-00000.tar" in fault["where"] for fault in damage)


def test_other_texts_than_the_run_was_begun_with_are_told(tmp_path, capsys):
    (tmp_path / "parts").mkdir()
    root = spoilt_parts(tmp_path / "parts", [])
    for steps in (2, 3, 4):
        recipe = recipe_of(root, "stage1", f"training.steps={steps}")
        capsys.readouterr()
        train(build_in(root, recipe, tmp_path / "run"), recipe, tmp_path / "run")
        assert ("train holds other samples than up to now" in capsys.readouterr().err) == (steps == 4)
        if steps == 3:
            samples = [picture(number) for number in range(12)]
            samples[5] = dataclasses.replace(samples[5], captions=("something else",))
            write_manifest(root / "pictures", "pictures", {"train": write_split(root / "pictures", "train", samples)})


@pytest.mark.parametrize(("stage", "measure"), [("stage1", "r1"), ("stage2", "cider"), ("instruct", "vqa")])
def test_a_run_is_judged_by_a_table_whose_pictures_lie_elsewhere(root, tmp_path, stage, measure):
    (tmp_path / "elsewhere").mkdir()
    rows = []
    for number in range(4):
        sample = picture(number)
        (tmp_path / "elsewhere" / f"{number}.png").write_bytes(sample.image)
        question = {"question": "what colour ?", "answers": ["red", "green"]} if stage == "instruct" else {}
        rows.append({"photo": f"{number}.png", "caption": sample.captions[0], **question})
    rows += [{"photo": "gone.png", "caption": "x"}, {"photo": "0.png", "caption": ""}]
    (tmp_path / "val.jsonl").write_text("\n".join(map(json.dumps, rows)))
    judged = {
        "source": str(tmp_path / "val.jsonl"),
        "images": str(tmp_path / "elsewhere"),
        "columns": {"image": "photo"},
    }
    name = f"{tmp_path / 'val.jsonl'}/{measure}"
    recipe = recipe_of(
        root, stage, f"data.validation=[{json.dumps(judged)}]", f"training.best_metric={name}", "data.stop_share=1.0"
    )
    summary = train(build_in(root, recipe, tmp_path / "run"), recipe, tmp_path / "run")
    assert name in summary.metrics
    with pytest.raises(BadRecipe, match=f"evaluations give no val/r2; they give .*{measure}"):
        build_in(root, apply_overrides(recipe, ["training.best_metric=val/r2"]), tmp_path / "other")


def test_what_stage_1_cannot_be_judged_by_is_named_before_anything_is_computed(root, tmp_path, capsys):
    (tmp_path / "0.png").write_bytes(picture(0).image)
    (tmp_path / "val.jsonl").write_text(json.dumps({"image": "0.png", "question": "what ?", "answer": "a cup"}))
    recipe = recipe_of(root, "stage1", f"data.validation=[{tmp_path / 'val.jsonl'}]")
    with pytest.raises(BadRecipe, match=r"data.validation: .*val.jsonl has no captions\."):
        build_in(root, recipe, tmp_path / "run")
    capsys.readouterr()
    recipe = recipe_of(root, "stage1", "training.best_metric=val/r1", "data.mixture.0.num_views=5")
    with pytest.raises(BadRecipe, match=r"they give nothing, for data\.validation is empty"):
        build_in(root, recipe, tmp_path / "run")
    recipe = recipe_of(root, "stage1", "training.batch_size=1", "data.mixture.0.num_views=5")
    with pytest.raises(BadRecipe, match=r"at least twice training\.accumulation"):
        build_in(root, recipe, tmp_path / "run")
    assert "image features" not in capsys.readouterr().err


def test_a_start_that_is_not_there_is_told_before_anything_is_computed(root, tmp_path, capsys):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for missing in ("no-such-run", str(tmp_path / "run"), str(tmp_path / "a.safetensors")):
        recipe = recipe_of(root, "stage1", f"model.init_from={missing}", "data.mixture.0.num_views=7")
        with pytest.raises(MissingFile, match=r"model\.init_from: "):
            build_in(root, recipe, tmp_path / "new")
    assert "image features" not in capsys.readouterr().err


@pytest.mark.parametrize("broken_off", [3, 9, 25])
def test_features_that_were_broken_off_count_each_broken_picture_once(tmp_path, monkeypatch, broken_off):
    (tmp_path / "parts").mkdir()
    root = spoilt_parts(tmp_path / "parts", [1, 7])
    recipe = recipe_of(root, "stage1", "data.stop_share=1.0", "data.mixture.0.num_views=3")
    monkeypatch.setattr(sources, "ENCODE", 2)
    real, calls = sources._encoded, []

    def encoded(*given):
        calls.append(given)
        if len(calls) * 2 > broken_off:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(sources, "_encoded", encoded)
    with pytest.raises(KeyboardInterrupt):
        build_in(root, recipe, tmp_path / "run")
    monkeypatch.setattr(sources, "_encoded", real)
    faults = build_in(root, recipe, tmp_path / "run").faults
    assert (faults.num_seen, faults.num_faults, faults.num_named) == (24, 2, 2)


def test_what_a_run_is_judged_by_is_no_reason_to_stop_it_where_little_of_it_is_bad(root, tmp_path):
    (tmp_path / "0.png").write_bytes(picture(0).image)
    rows = [json.dumps({"image": "0.png", "caption": f"cup {number}"}) for number in range(290)] + ["broken"] * 10
    (tmp_path / "val.jsonl").write_text("\n".join(rows))
    recipe = recipe_of(root, "stage1", f"data.validation=[{tmp_path / 'val.jsonl'}]")
    assert build_in(root, recipe, tmp_path / "run").faults.num_faults == 10


def test_a_text_that_is_not_utf8_is_one_fault(root, tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(picture(number).image)
        (tmp_path / f"{number}.txt").write_bytes(b"a cup" if number else b"\xe9t\xe9")
    recipe = recipe_of(root, "stage1", f"data.mixture=[{{source: {tmp_path}}}]", "data.stop_share=1.0")
    build_in(root, recipe, tmp_path / "run")
    (line,) = (tmp_path / "run" / "faults.jsonl").read_text().splitlines()
    assert json.loads(line) == {"sample": "0.png", "where": str(tmp_path / "0.txt"), "reason": "is not UTF-8"}
