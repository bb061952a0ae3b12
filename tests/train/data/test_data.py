"""Data: captioned images of every origin into caches, killed and gone on with, and batches out of them."""

import io
import json
import multiprocessing
import random
import shutil
import signal
import sys
import tarfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import QwenImageImg2ImgPipeline, QwenImagePipeline
from PIL import Image
from safetensors import safe_open

from ppcl_rt.cli import main as cli
from ppcl_train import pipeline
from ppcl_train.config.presets import PRESETS
from ppcl_train.config.settings import RunConfig, with_changes
from ppcl_train.data import caching, calibration, captioned, shards, streams
from ppcl_train.data import source as data
from ppcl_train.data.teacher_file import load_teacher
from ppcl_train.engine.files import read_note, write_tensors
from ppcl_train.families import base as family
from ppcl_train.scenes import encoding, judging, language, rendering
from ppcl_train.stages import teacher
from ppcl_train.stages.assembly import assembled, opened

if find_spec("webdataset") is None or find_spec("datasets") is None:
    pytest.skip("needs the train extra", allow_module_level=True)

CAPTIONS = [
    "a red square at a1",
    "a green circle at b2",
    "a blue triangle at c3",
    "a yellow cross at d4",
    "a magenta ring at a2",
    "a cyan stripe at b3",
    "a red ring at c4",
    "a blue square at d1",
]
EXAMPLE = Path(__file__).parents[3] / "examples" / "scenes"


@pytest.fixture(scope="module")
def images(captioned_folder):
    return captioned_folder


@pytest.fixture(scope="module")
def cache(qwen_cache):
    return qwen_cache


@pytest.fixture(scope="module")
def encoder(qwen_folder):
    return family.of("qwen-image").open(str(qwen_folder), device="cpu", dtype=torch.float32, draws=False)


def cached(reader, folder, encoder, **more):
    """Cache into small shards at 32 x 32."""
    arguments = {"settings": {}, "dtype": torch.float32, "area": 32 * 32, "per_shard": 3, **more}
    return caching.cache("qwen-image", encoder, reader, folder, **arguments)


def files(folder):
    """Name -> bytes; a kill just after a rename leaves an empty folder `.NAME.partial`, which no reader looks at."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".partial"}


def samples(folder):
    """Everything in a cache: caption -> (latents, embeddings)."""
    found = {}
    for path in sorted(folder.glob("0*.safetensors")):
        note = read_note(path)
        with safe_open(path, framework="pt") as file:
            for n, caption in enumerate(note["captions"]):
                found[caption] = (file.get_tensor(f"latents.{n}"), file.get_tensor(f"embeddings.{n}"))
    return found


def config(cache, teacher_folder, **changes):
    settings = {"data.cache": str(cache), "teacher.pretrained": str(teacher_folder), "teacher.dtype": "float32"}
    return with_changes(PRESETS["qwen-image"], {**settings, "storage": "float32", **changes})


def test_buckets_have_sides_that_fit_and_areas_that_are_near():
    for area, multiple in ((1024**2, 16), (512**2, 16), (1328**2, 16)):
        sizes = captioned.buckets(area, multiple)
        assert len(sizes) == len(captioned.ASPECTS)
        assert all(side % multiple == 0 for size in sizes for side in size)
        assert all(abs(width * height / area - 1) < 0.05 for width, height in sizes)
    tall = captioned.fit(Image.new("RGB", (600, 1000)), captioned.buckets(1024**2, 16))
    # 0.6 lies between 9:16 and 2:3, nearer to the first.
    assert tall.size == (768, 1360)


def test_fitting_crops_the_middle_and_distorts_nothing():
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (50, 0, 250, 100))
    assert set(captioned.fit(image, [(200, 100)]).getcolors()) == {(20_000, (0, 0, 255))}


def test_latents_and_embeddings_are_those_of_the_pipeline(qwen_folder, encoder):
    """diffusers' own image-to-image pipeline and decoder agree about what latents are."""
    image = Image.fromarray(np.random.default_rng(5).integers(0, 256, (32, 48, 3), dtype=np.uint8))
    latents, shape = encoder.encode(image)
    assert shape == (1, 4, 6) and latents.shape == (24, 16)
    parts = encoder.pipe.components
    other = QwenImageImg2ImgPipeline(**parts)

    class Mode:
        config, dtype = other.vae.config, other.vae.dtype

        def encode(self, pixels):
            given = encoder.pipe.vae.encode(pixels).latent_dist.mode()
            return type("Encoded", (), {"latents": given})()

    pixels = other.image_processor.preprocess(image, height=32, width=48)[:, :, None]
    with torch.no_grad():
        other.vae = Mode()
        theirs = other._encode_vae_image(pixels, None).transpose(1, 2)
    theirs = other._pack_latents(theirs, 1, 4, *theirs.shape[-2:])[0]
    assert torch.allclose(latents, theirs, atol=1e-6)
    # The fixture's VAE has a mean and a deviation, or this would say nothing about them.
    assert encoder.pipe.vae.config.latents_mean != [0.0] * 4 and latents.std() > 0.1
    text = encoder.embed(CAPTIONS[0])
    with torch.no_grad():
        wanted, _ = encoder.pipe.encode_prompt(CAPTIONS[0])
    assert torch.equal(text, wanted[0])


def test_three_sources_give_the_same_samples(images, encoder, cache, tmp_path):
    """The same images as a folder with metadata, as tar shards and as a dataset: the same tensors."""
    import datasets

    names = [f"{n}.png" for n in range(8)]
    listed = tmp_path / "listed"
    shutil.copytree(images, listed, ignore=shutil.ignore_patterns("*.txt"))
    rows = [json.dumps({"file_name": name, "text": caption}) for name, caption in zip(names, CAPTIONS, strict=True)]
    (listed / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    for shard in range(2):
        with tarfile.open(tmp_path / f"part-{shard}.tar", "w") as tar:
            for n in range(4 * shard, 4 * shard + 4):
                caption = json.dumps({"text": CAPTIONS[n]}).encode() if n % 2 else CAPTIONS[n].encode()
                members = {f"{n}.png": (images / f"{n}.png").read_bytes(), f"{n}.{'json' if n % 2 else 'txt'}": caption}
                for name, content in members.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    made = datasets.Dataset.from_dict({"image": [str(images / name) for name in names], "text": CAPTIONS})
    made.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "dataset")
    readers = {
        "listed": captioned.Folder(listed),
        "globbed": captioned.Tars(str(tmp_path / "part-*.tar")),
        "braces": captioned.Tars(str(tmp_path / "part-{0..1}.tar")),
        "dataset": captioned.Dataset(str(tmp_path / "dataset")),
    }
    wanted = samples(cache)
    assert set(wanted) == set(CAPTIONS)
    for name, reader in readers.items():
        manifest = cached(reader, tmp_path / f"cache-{name}", encoder)
        got = samples(tmp_path / f"cache-{name}")
        assert manifest.samples == 8 and not manifest.skipped.count and list(got) == list(wanted), name
        assert all(torch.equal(a, b) for key in wanted for a, b in zip(got[key], wanted[key])), name
        # Reading from a position on is reading from the start and leaving out.
        assert [item.name for item in reader.read(5)] == [item.name for item in reader.read(0)][5:], name


def test_what_cannot_be_used_is_named_and_left_out_or_stops(images, encoder, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    (folder / "1.png").write_bytes(b"no picture")
    (folder / "2.png").write_bytes((images / "2.png").read_bytes()[:2000])
    (folder / "3.txt").unlink()
    (folder / "4.txt").write_text(" \n")
    (folder / "5.txt").write_bytes(b"\xff\xfe\xff")
    manifest = cached(captioned.Folder(folder), tmp_path / "cache", encoder)
    assert manifest.samples == 3 and manifest.skipped.count == 5
    told = " | ".join(manifest.skipped.first)
    for what in (
        "1.png: no image",
        "2.png: cannot be decoded",
        "3.png: has no 3.txt",
        "4.png: has no cap",
        "5.png: its",
    ):
        assert what in told
    with pytest.raises(ValueError, match=r"1\.png: no image") as stopped:
        cached(captioned.Folder(folder), tmp_path / "strict", encoder, strict=True)
    assert "\n" not in str(stopped.value)
    for path in folder.glob("*.txt"):
        path.unlink()
    with pytest.raises(ValueError, match=r"nothing was cached, 8 left out; the first: 0\.png"):
        cached(captioned.Folder(folder), tmp_path / "nothing", encoder)


def test_sources_that_are_not_there_say_so(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n{"file": 3}\n')
    (tmp_path / "cut.tar").write_bytes(b"no tar at all" * 100)
    wrong = {
        "there is no folder": lambda: captioned.Folder(tmp_path / "nowhere"),
        "holds no images": lambda: captioned.Folder(tmp_path / "empty"),
        "metadata.jsonl, line 2": lambda: captioned.Folder(tmp_path / "broken"),
        "there is no shard": lambda: captioned.Tars(str(tmp_path / "x-*.tar")),
        "there is no shard .*x-1.tar": lambda: captioned.Tars(str(tmp_path / "x-{1..2}.tar")),
        r"cannot be read: .*cut\.tar": lambda: list(captioned.Tars(str(tmp_path / "cut.tar")).read(0)),
        "cannot be loaded": lambda: captioned.Dataset(str(tmp_path / "nowhere")),
        "is no cache": lambda: shards.Shards(tmp_path / "empty"),
        "cannot be opened as a Qwen-Image": lambda: family.of("qwen-image").open(
            str(tmp_path / "empty"), device="cpu", dtype=torch.float32, draws=False
        ),
        "holds no prompts": lambda: caching.read_prompts(tmp_path / "none.txt"),
        "bytes is like": lambda: caching.bytes_of("many"),
        "size is like": lambda: caching.size_of("32"),
        "reads a cache": lambda: calibration.inputs(PRESETS["qwen-image"], 1, calibration.CHECK),
    }
    (tmp_path / "none.txt").write_text("\n\n")
    for message, act in wrong.items():
        with pytest.raises(ValueError, match=message) as raised:
            act()
        assert "\n" not in str(raised.value)


def test_a_byte_budget_holds_and_may_be_raised(images, encoder, cache, tmp_path):
    whole = files(cache)
    reader = captioned.Folder(images)
    size = sum(len(content) for name, content in whole.items() if name != shards.MANIFEST)
    kept = []
    for budget in (size // 2, size * 3 // 4, size):
        manifest = cached(reader, tmp_path / "cache", encoder, limits=shards.Limits(max_bytes=budget))
        on_disk = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.safetensors"))
        assert on_disk == manifest.bytes <= budget and manifest.complete
        assert len(shards.Shards(tmp_path / "cache")) == manifest.samples
        kept.append(manifest.samples)
    # Raised to the size of all, it holds what a cache without a budget does.
    assert 0 < kept[0] < kept[1] < kept[2] == 8
    raised = files(tmp_path / "cache")
    assert {n: c for n, c in raised.items() if n != shards.MANIFEST} == {
        n: c for n, c in whole.items() if n != shards.MANIFEST
    }
    with pytest.raises(ValueError, match="raise --max-bytes"):
        cached(reader, tmp_path / "cache", encoder, limits=shards.Limits(max_bytes=size // 2))
    with pytest.raises(ValueError, match="less than one sample"):
        cached(
            reader, tmp_path / "small", encoder, limits=shards.Limits(max_bytes=len(whole["empty.safetensors"]) + 99)
        )
    manifest = cached(reader, tmp_path / "five", encoder, limits=shards.Limits(samples=5))
    assert manifest.samples == 5 and list(samples(tmp_path / "five")) == CAPTIONS[:5]


def test_a_cache_of_something_else_is_refused(images, encoder, cache, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(cache, folder)
    before = files(folder)
    with pytest.raises(ValueError, match="was begun with area = 1024"):
        cached(captioned.Folder(images), folder, encoder, area=48 * 48)
    # The same again does nothing.
    assert cached(captioned.Folder(images), folder, encoder).samples == 8 and files(folder) == before
    with pytest.raises(ValueError, match=r"cache of qwen-image, the run's task is scenes"):
        calibration.inputs(with_changes(PRESETS["scenes"], {"data.cache": str(folder)}), 1, calibration.CHECK)
    (folder / "00001.safetensors").write_bytes(before["00001.safetensors"][:-1])
    with pytest.raises(ValueError, match=r"00001\.safetensors is missing or not whole"):
        shards.Shards(folder)
    (folder / shards.MANIFEST).write_bytes(
        json.dumps({**json.loads(before[shards.MANIFEST]), "complete": False}).encode()
    )
    with pytest.raises(ValueError, match="is not complete"):
        shards.Shards(folder)


def test_a_cache_that_is_killed_ends_with_the_same_bytes(tmp_path):
    def fill(folder):
        encoder = family.of("scenes").open("", device="cpu", dtype=torch.float32, draws=False)
        reader = captioned.MadeScenes(1500, seed=1)
        caching.cache("scenes", encoder, reader, folder, settings={}, dtype=torch.float32, per_shard=16)

    def begin(folder):
        # Forked, so that no time goes into imports.
        process = multiprocessing.get_context("fork").Process(target=fill, args=(folder,))
        process.start()
        return process

    started = time.monotonic()
    begin(tmp_path / "whole").join()
    whole = time.monotonic() - started
    rng, kills, seen = random.Random(time.time_ns()), 0, []
    for _ in range(10):
        process = begin(tmp_path / "killed")
        process.join(rng.uniform(0.02, 0.3) * whole)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        seen.append(len(list((tmp_path / "killed").glob("0*.safetensors"))))
    process = begin(tmp_path / "killed")
    process.join()
    assert process.exitcode == 0 and kills > 0 and seen == sorted(seen) and seen[-1] > 0, seen
    assert files(tmp_path / "killed") == files(tmp_path / "whole"), (kills, seen)


def test_parts_share_the_work(images, encoder, cache, tmp_path):
    for part in range(3):
        cached(captioned.Folder(images), tmp_path / "parts" / str(part), encoder, part=(part, 3), per_shard=1)
    both = shards.Shards(tmp_path / "parts")
    whole = shards.Shards(cache)
    assert {shape: len(places) for shape, places in both.buckets.items()} == {
        shape: len(places) for shape, places in whole.buckets.items()
    }
    assert set(samples(tmp_path / "parts" / "1")) == set(CAPTIONS[1::3])


def test_batches_are_of_one_shape_and_padded(cache, qwen_folder):
    run = config(cache, qwen_folder)
    held = shards.Shards(cache)
    assert len(held) == 8 and len(held.buckets) > 2
    for seed in range(20):
        batch = calibration.inputs(run, 3, calibration.CHECK + seed)
        (shape,) = {tuple(shapes[0]) for shapes in batch.call["img_shapes"]}
        assert batch.x.shape == (3, shape[1] * shape[2], 16) and shape in held.buckets
        mask, embeddings = batch.mask, batch.call["encoder_hidden_states"]
        assert mask.shape == embeddings.shape[:2] and mask.any(1).all() and mask[:, 0].all()
        assert mask.sum(1).max() == mask.shape[1] and not embeddings[~mask].any()
        # Words first, padding behind.
        assert (mask.long().diff(dim=1) <= 0).all()


def test_shapes_and_samples_are_drawn_as_often_as_they_are(cache, qwen_folder):
    run, held = config(cache, qwen_folder), shards.Shards(cache)
    drawn = [
        tuple(calibration.inputs(run, 1, calibration.CHECK + seed).call["img_shapes"][0][0]) for seed in range(400)
    ]
    for shape, places in held.buckets.items():
        share = len(places) / len(held)
        # Four standard deviations of a count of 400 draws.
        assert abs(drawn.count(shape) / 400 - share) < 4 * (share * (1 - share) / 400) ** 0.5


def test_a_seed_alone_decides_a_batch(cache, qwen_folder):
    run = config(cache, qwen_folder)
    first, again, other = (calibration.inputs(run, 2, calibration.CHECK + seed) for seed in (7, 7, 8))
    data._opened.cache_clear()
    fresh = calibration.inputs(run, 2, calibration.CHECK + 7)
    for same in (again, fresh):
        assert torch.equal(first.x, same.x) and torch.equal(first.t, same.t)
        assert torch.equal(first.call["encoder_hidden_states"], same.call["encoder_hidden_states"])
    assert not torch.equal(first.t, other.t)
    another = with_changes(run, {"seed": 1})
    assert not torch.equal(first.t, calibration.inputs(another, 2, calibration.CHECK + 7).t)
    # Which samples are drawn follows the run's seed too: of ten batches not all are the same.
    shapes = [
        [data.source(config).samples(1, calibration.CHECK + seed).latents.sum() for seed in range(10)]
        for config in (run, another)
    ]
    assert shapes[0] != shapes[1]


def test_noise_is_as_the_config_says_and_velocity_points_at_the_sample(cache, qwen_folder):
    run = config(cache, qwen_folder, **{"time_mean": 0.69, "time_std": 0.5})
    t = torch.cat([calibration.inputs(run, 64, calibration.CHECK + seed).t for seed in range(20)])
    logits = torch.logit(t)
    # 1,280 draws: four standard errors are 0.056 and 0.04.
    assert abs(logits.mean() - 0.69) < 0.056 and abs(logits.std() - 0.5) < 0.04
    batch = calibration.inputs(run, 2, calibration.CHECK + 3)
    assert batch.predicts == "velocity"
    clean = [latents for latents, _ in samples(cache).values() if latents.shape == batch.x.shape[1:]]
    noise_free = batch.clean(torch.zeros_like(batch.x))
    assert torch.equal(noise_free, batch.x)
    found = 0
    for n in range(2):
        for latents in clean:
            noise = (batch.x[n] - (1 - batch.t[n]) * latents) / batch.t[n]
            velocity = (noise - latents).expand(2, -1, -1)
            # Of all samples of this shape, one leaves noise behind that is noise: its own.
            if torch.allclose(batch.clean(velocity)[n], latents, atol=1e-4):
                found += 1
    assert found == 2 * len(clean)


def test_captions_are_dropped_for_the_empty_prompt(cache, qwen_folder, encoder):
    run = config(cache, qwen_folder, **{"teacher.drop_caption": 0.5})
    empty, dropped = encoder.embed(""), 0
    for seed in range(50):
        batch = calibration.inputs(run, 2, calibration.CHECK + seed)
        for embeddings, mask in zip(batch.call["encoder_hidden_states"], batch.mask):
            dropped += len(empty) == mask.sum() and torch.equal(embeddings[mask], empty)
    assert 30 <= dropped <= 70


def test_measuring_asks_for_the_negative_prompt_and_for_samples_that_training_never_sees(
    cache, qwen_folder, encoder, monkeypatch
):
    monkeypatch.setattr(data, "_HELD_OUT", 2)
    run = config(cache, qwen_folder, **{"teacher.drop_caption": 0.9, "sampler.guidance": 4.0, "measure.samples": 24})
    negative, empty = encoder.embed(" "), encoder.embed("")
    held, trained = set(), set()
    for seed in range(40):
        made = data.source(run).samples(2, calibration.CHECK + seed, of="held out")
        held |= {latents.sum().item() for latents in made.latents}
        trained |= {latents.sum().item() for latents in data.source(run).samples(2, calibration.CHECK + seed).latents}
    assert held and trained and not held & trained
    for batch in calibration.measured(run, 24, calibration.MEASURE):
        size = len(batch.x)
        for n, (embeddings, mask) in enumerate(zip(batch.call["encoder_hidden_states"], batch.mask)):
            text = embeddings[mask]
            assert torch.equal(text, negative) if n >= size else len(text) != len(empty) or not torch.equal(text, empty)
        wanted, free = torch.randn(2, *batch.x.shape)
        # The clean image is that of the guided velocity, as the pipeline guides it.
        guided = free + 4.0 * (wanted - free)
        guided *= wanted.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        clean = batch.x - batch.t[:, None, None] * guided
        assert torch.allclose(batch.clean(torch.cat([wanted, free])), clean, atol=1e-5)


def test_a_cache_without_a_negative_prompt_says_so_and_gets_one(images, encoder, qwen_folder, tmp_path):
    old = tmp_path / "old"
    cached(captioned.Folder(images), old, encoder)
    whole = files(old)
    write_tensors(old / "empty.safetensors", {"embeddings": encoder.embed("")}, {})
    run = config(old, qwen_folder)
    with pytest.raises(ValueError, match="lacks embeddings of the negative prompt ' '"):
        calibration.inputs(run, 1, calibration.CHECK)
    assert len(calibration.inputs(with_changes(run, {"sampler.guidance": 1.0}), 1, calibration.CHECK).x) == 1
    # The guidance of a prompt that every cache has.
    assert len(calibration.inputs(with_changes(run, {"sampler.negative": ""}), 1, calibration.CHECK).x) == 1
    cached(captioned.Folder(images), old, encoder)
    data._opened.cache_clear()
    assert files(old) == whole and len(calibration.inputs(run, 1, calibration.CHECK).x) == 1


def test_scenes_from_a_cache_are_scenes(tmp_path):
    """The same pictures, words and timesteps as are made on the spot; the model says the same of them."""
    encoder = family.of("scenes").open("", device="cpu", dtype=torch.float32, draws=False)
    reader = captioned.MadeScenes(40, seed=3)
    caching.cache("scenes", encoder, reader, tmp_path / "made", settings={}, dtype=torch.float32)
    direct = with_changes(PRESETS["scenes"], {"teacher.drop_caption": 0.0, "time_std": 1e-3, "time_mean": -14})
    run = with_changes(direct, {"data.cache": str(tmp_path / "made")})
    made, held = (calibration.inputs(config, 40, calibration.CHECK + 5) for config in (direct, run))
    # The seed decides the same timesteps and noise; at t = 1e-6 what is left is the picture.
    assert torch.equal(made.t, held.t) and made.predicts == held.predicts == "clean"
    assert made.call.keys() == held.call.keys() and made.call["img_shapes"] == held.call["img_shapes"]
    right = {}
    for item in reader.read(0):
        picture, caption = item.open()
        right[caption] = encoding.to_tokens(picture[None])[0]
    for x, embeddings, mask in zip(held.x, held.call["encoder_hidden_states"], held.mask):
        (caption,) = [c for c, tokens in right.items() if (tokens - x).abs().max() < 1e-4] or [None]
        words, word_mask = encoding.encode([caption])
        assert torch.equal(embeddings[mask], words[0, word_mask[0]])
    # Captions of 7 words at most, padded to the longest there is, which changes nothing.
    model = teacher.initial(TINY).eval()
    with torch.no_grad():
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1)
        output = model(**held.call)[0]
        longer = {**held.call}
        extra = language.MAX_TOKENS + 3 - held.mask.shape[1]
        longer["encoder_hidden_states"] = torch.nn.functional.pad(held.call["encoder_hidden_states"], (0, 0, 0, extra))
        longer["encoder_hidden_states_mask"] = torch.nn.functional.pad(held.mask, (0, extra))
        assert torch.allclose(output, model(**longer)[0], atol=1e-5)


def test_scenes_from_image_files(tmp_path):
    """The whole way for real: scenes as PNG files with captions; 8 bits keep what the judge reads."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    captions = [language.training_caption(rng) for _ in range(12)]
    for n, caption in enumerate(captions):
        pixels = (rendering.render(caption, rng) + 1) * 127.5
        Image.fromarray(pixels.round().astype(np.uint8)).save(folder / f"{n:02d}.png")
        (folder / f"{n:02d}.txt").write_text(str(caption))
    (folder / "zz.png").write_bytes((folder / "00.png").read_bytes())
    (folder / "zz.txt").write_text("a photograph of a cat")
    encoder = family.of("scenes").open("", device="cpu", dtype=torch.float32, draws=False)
    made = caching.cache(
        "scenes", encoder, captioned.Folder(folder), tmp_path / "cache", settings={}, dtype=torch.float32
    )
    assert made.samples == 12 and made.skipped.count == 1 and made.skipped.first[0].startswith("zz.png: ")
    held = samples(tmp_path / "cache")
    images = encoding.to_images(torch.stack([held[str(caption)][0] for caption in captions]))
    assert (judging.judge(captions, images) == 1).all()


def test_the_teacher_draws_its_own_pairs(qwen_folder, tmp_path):
    """Latents are what the pipeline's decoder turns into the picture that the pipeline draws."""
    encoder = family.of("qwen-image").open(str(qwen_folder), device="cpu", dtype=torch.float32, draws=True)
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": c}) for c in CAPTIONS[:5]) + "\n\n")
    prompts = caching.read_prompts(tmp_path / "prompts.jsonl")
    settings = {
        "settings": {},
        "dtype": torch.float32,
        "sizes": [(32, 32), (48, 32)],
        "steps": 2,
        "guidance": 3.0,
        "negative": " ",
        "per_shard": 2,
    }
    made = caching.generate("qwen-image", encoder, prompts, tmp_path / "cache", **settings)
    assert made.samples == 5 and {shape for s in made.shards for shape in s.shapes} == {(1, 4, 4), (1, 4, 6)}
    latents, embeddings = samples(tmp_path / "cache")[CAPTIONS[1]]
    assert torch.equal(embeddings, encoder.embed(CAPTIONS[1]))
    wanted = encoder.pipe(
        CAPTIONS[1],
        negative_prompt=" ",
        true_cfg_scale=3.0,
        width=48,
        height=32,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
    ).images[0]
    vae = encoder.pipe.vae
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    unpacked = QwenImagePipeline._unpack_latents(latents[None], 32, 48, encoder.pipe.vae_scale_factor)
    with torch.no_grad():
        picture = vae.decode(unpacked * std + mean).sample[0, :, 0] / 2 + 0.5
    assert torch.allclose(picture.clamp(0, 1), wanted, atol=1e-5)
    # Going on where a shard is missing draws the same again.
    before = files(tmp_path / "cache")
    for name in ("00002.safetensors", shards.MANIFEST):
        (tmp_path / "cache" / name).unlink()
    caching.generate("qwen-image", encoder, prompts, tmp_path / "cache", **settings)
    assert files(tmp_path / "cache") == before
    with pytest.raises(ValueError, match="multiples of 8"):
        caching.generate("qwen-image", encoder, prompts, tmp_path / "odd", **{**settings, "sizes": [(33, 32)]})


def test_a_checkpoint_draws_scenes_into_a_cache(tmp_path):
    """The shipped checkpoint's own pictures, through the same command: the judge finds in them what was asked for."""
    encoder = family.of("scenes").open(str(EXAMPLE), device="cpu", dtype=torch.float32, draws=True)
    captions = language.held_out_captions(1, seed=3)
    prompts = [*map(str, captions), "a photograph of a cat"]
    settings = {"settings": {}, "dtype": torch.float32, "sizes": [(16, 16)], "steps": 8, "guidance": 1.3}
    made = caching.generate("scenes", encoder, prompts, tmp_path / "cache", negative=" ", **settings)
    assert made.samples == 5 and made.skipped.count == 1 and made.skipped.first[0].startswith("prompt 6: ")
    held = samples(tmp_path / "cache")
    images = encoding.to_images(torch.stack([held[str(caption)][0] for caption in captions]))
    # The checkpoint's soft score is 0.98; pictures of other captions score less than half.
    assert judging.judge(captions, images).mean() > 0.8
    assert judging.judge(captions[1:], images[:-1]).mean() < 0.5
    run = with_changes(PRESETS["scenes"], {"data.cache": str(tmp_path / "cache")})
    assert calibration.inputs(run, 4, calibration.CHECK).x.shape == (4, 16, 48)
    with pytest.raises(ValueError, match="16x16"):
        caching.generate("scenes", encoder, prompts, tmp_path / "b", negative=" ", **{**settings, "sizes": [(32, 32)]})


def test_a_pretrained_teacher_runs_on_cached_batches(cache, qwen_folder, tmp_path):
    """From a pipeline folder: noted with its hash, not copied; what it says is what diffusers' transformer says."""
    run = config(cache, qwen_folder, batch=2)
    teacher.train(run, tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 10_000
    assert pipeline.is_done(pipeline.STAGES[0], tmp_path)
    model = load_teacher(run, tmp_path)
    stock = QwenImagePipeline.from_pretrained(qwen_folder).transformer
    for batch in calibration.batches(run, 8, calibration.PROBES):
        with torch.no_grad():
            output, wanted = model(**batch.call)[0], stock(**batch.call)[0]
        assert torch.isfinite(output).all() and torch.allclose(output, wanted, atol=1e-4)
        passed = streams.trace(model, batch)
        assert len(passed.streams) == 1 + len(model.transformer_blocks)
    # The transformer's own folder does as well, and in bfloat16 it computes in bfloat16.
    half = config(cache, qwen_folder / "transformer", **{"storage": "bfloat16", "teacher.dtype": "bfloat16"})
    teacher.train(half, tmp_path / "half")
    batch = calibration.inputs(half, 2, calibration.CHECK)
    assert batch.x.dtype == torch.float32 and batch.call["hidden_states"].dtype == torch.bfloat16
    assert load_teacher(half, tmp_path / "half")(**batch.call)[0].dtype == torch.bfloat16
    # A checkpoint of it names no judge.
    source = assembled(run, tmp_path, {})
    assert source.catalog.task is None
    with torch.no_grad():
        assert torch.allclose(
            opened(run, source)(
                **batch.call
                | {"hidden_states": batch.x, "encoder_hidden_states": batch.call["encoder_hidden_states"].float()}
            )[0],
            stock(
                **batch.call
                | {"hidden_states": batch.x, "encoder_hidden_states": batch.call["encoder_hidden_states"].float()}
            )[0],
            atol=1e-4,
        )


def test_another_teacher_than_the_run_began_with_is_refused(cache, qwen_folder, tmp_path, made):
    folder = tmp_path / "pipeline"
    shutil.copytree(qwen_folder, folder)
    run = config(cache, folder)
    teacher.train(run, tmp_path / "run")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    # Another date alone is no other teacher; one bit is.
    weights.touch()
    load_teacher(run, tmp_path / "run")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="is not the teacher that"):
        load_teacher(run, tmp_path / "run")
    with pytest.raises(ValueError, match="pluggable or pruned checkpoint"):
        teacher.train(config(cache, made.folder), tmp_path / "other")
    with pytest.raises(ValueError, match="neither a checkpoint folder nor"):
        teacher.train(config(cache, tmp_path / "nowhere"), tmp_path / "other")


def test_commands(qwen_folder, images, tmp_path, capsys, monkeypatch):
    """``ppcl train cache`` and ``generate``, as typed."""

    def ppcl(*arguments):
        monkeypatch.setattr(sys, "argv", ["ppcl", "train", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code or 0, capsys.readouterr()

    given = ("--pipeline", qwen_folder, "--dtype", "float32", "--device", "cpu")
    status, said = ppcl("cache", *given, "--images", images, "--area", 1024, "--out", tmp_path / "a", "--samples", 4)
    assert not status and "holds 4 samples" in said.out
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    size = ("--size", "32x32", "--steps", 1, "--guidance", 1)
    status, said = ppcl(
        "generate", *given, "--prompts", tmp_path / "prompts.txt", *size, "--out", tmp_path / "b", "--part", "2/2"
    )
    assert not status and "holds 1 samples" in said.out and set(samples(tmp_path / "b")) == {"a dog"}
    status, _ = ppcl("cache", "--family", "scenes", "--scenes", 10, "--out", tmp_path / "c")
    assert not status and len(shards.Shards(tmp_path / "c")) == 10
    for wrong in (
        ("cache", "--out", tmp_path / "d"),
        ("cache", "--images", images, "--out", tmp_path / "d"),
        ("cache", "--family", "flux", "--pipeline", "x", "--images", images, "--out", tmp_path / "d"),
        ("cache", *given, "--images", images, "--part", "3/2", "--out", tmp_path / "d"),
        ("cache", *given, "--images", images, "--max-bytes", "lots", "--out", tmp_path / "d"),
        ("generate", *given, "--prompts", tmp_path / "nowhere.txt", "--out", tmp_path / "d"),
    ):
        status, said = ppcl(*wrong)
        assert status == 2 and said.err.strip().count("\n") == 0, (wrong, said)
    assert not (tmp_path / "d").exists()


ARCHITECTURE = {**PRESETS["scenes"].teacher.architecture, "num_layers": 4, "num_attention_heads": 2}
TINY = with_changes(PRESETS["scenes"], {"teacher.architecture": ARCHITECTURE})


def test_the_preset_is_the_papers():
    preset = PRESETS["qwen-image"]
    assert RunConfig.model_validate_json(preset.model_dump_json()) == preset
    assert preset.task == "qwen-image" and preset.storage == "bfloat16"
    assert preset.students.steps == 6000 and preset.students.weight_decay == 0.02
    assert family.of(preset.task).predicts == "velocity"
