"""A studio: what the page draws, what it says of bad input, and that people do not see each other's ratios."""

import importlib.util
import io
import json
import shutil
import threading

import pytest
import torch
from diffusers import QwenImagePipeline
from PIL import Image
from serving import CHECKPOINT

import ppcl_rt
from ppcl_rt import Plan
from ppcl_rt.cli import web
from ppcl_rt.pipelines import words
from ppcl_rt.pipelines.drawing import How
from ppcl_rt.pipelines.task import PipelineTask
from ppcl_rt.web.asking import LARGEST_SEED, Ask
from ppcl_rt.web.studio import STRIP, Studio

RING = "a red ring"
EMOJI = CHECKPOINT.parent / "emoji"


@pytest.fixture(scope="module")
def studio():
    return Studio.open(str(CHECKPOINT))


def pixels(drawn):
    return drawn.picture.tobytes()


def test_it_draws_what_the_command_line_draws(studio, ppcl, tmp_path):
    draws_as_the_command_line(studio, CHECKPOINT, RING, ppcl, tmp_path)


def test_so_it_does_through_the_shipped_pipeline(ppcl, tmp_path):
    draws_as_the_command_line(Studio.open(str(EMOJI)), EMOJI, "rocket", ppcl, tmp_path)


def draws_as_the_command_line(studio, checkpoint, prompt, ppcl, folder):
    ask = Ask.read(prompt, seed="3", ratio="0.4", steps="4")
    content = studio.png(ask, [studio.draw(ask)])
    options = ("--prompt", prompt, "--seed", 3, "--ratio", 0.4, "--steps", 4, "--out", folder / "x.png")
    status, _, err = ppcl("sample", checkpoint, *options)
    assert status == 0, err
    ours, theirs = Image.open(io.BytesIO(content)), Image.open(folder / "x.png")
    assert ours.tobytes() == theirs.tobytes() and ours.text == theirs.text
    assert ours.text["prompt"] == prompt and ours.text["seed"] == "3" and ours.text["checkpoint"] == str(checkpoint)
    assert studio.model.catalog.check(Plan.model_validate_json(ours.text["plan"]))


def test_it_says_what_a_picture_cost(studio):
    ask = Ask.read(RING, ratio="0.5", memory="6MB", steps="4")
    drawn, dense = studio.draw(ask), studio.dense(ask)
    assert drawn.made.asked == "ratio 0.5, memory 6,000,000"
    assert drawn.cost.memory <= 6e6 and drawn.cost.ratio <= 0.5
    assert dense.cost.ratio == 1 and dense.cost.params == studio.model.catalog.architecture.dense_params
    assert 0 < drawn.cost.step_ms < drawn.cost.ms and drawn.cost.alone
    assert studio.plan_png(drawn.made.plan) != studio.plan_png(dense.made.plan)


def test_a_picture_is_remembered_with_what_it_cost(studio):
    steps = []
    ask = Ask.read(RING, ratio="0.6", steps="2")
    once = studio.draw(ask, lambda done, of: steps.append((done, of)))
    again = studio.draw(ask, lambda done, of: steps.append((done, of)))
    assert once.cost == again.cost and steps == [(1, 2), (2, 2)]
    # The same plan, asked for in other words.
    by_plan = studio.draw(ask._replace(choice=once.made.plan))
    assert by_plan.picture is once.picture and by_plan.made.asked == f"ratio {once.cost.ratio:g}"


def test_a_picture_that_somebody_waits_for_is_not_drawn_twice(studio, monkeypatch):
    """Two pages that are opened at once ask for the same pictures."""
    whole, begun, asked, drawn, found = studio.task.sample, threading.Event(), threading.Event(), [], []

    def sample(*given):
        drawn.append(given)
        begun.set()
        assert asked.wait(60)
        return whole(*given)

    monkeypatch.setattr(studio.task, "sample", sample)
    ask = Ask.read(RING, seed="9", ratio="0.6", steps="2")
    people = [threading.Thread(target=lambda: found.append(studio.draw(ask))) for _ in range(2)]
    people[0].start()
    assert begun.wait(60)
    people[1].start()
    asked.set()
    for each in people:
        each.join()
    assert len(drawn) == 1 and len(found) == 2
    assert found[0].picture is found[1].picture and not studio._turns


def test_a_small_model_draws_with_one_thread(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    opened = web._opened(str(CHECKPOINT), 0.5, None, None, "cpu")
    assert asked == [1] and 1e6 < opened.model.costs(opened.model.catalog.dense)["flops"] < 1e9
    monkeypatch.setattr(web, "_FLOPS_OF_THREADS", 1e6)
    web._opened(str(CHECKPOINT), 0.5, None, None, "cpu")
    assert asked == [1]


def test_a_strip_goes_down_to_the_smallest_plan(studio, monkeypatch):
    ask = Ask.read(RING, ratio="1", steps="1")
    *_, drawn = studio.strip(ask)
    assert [each.made.asked for each in drawn] == [f"ratio {ratio:g}" for ratio in STRIP]
    assert all(each.cost.ratio <= ratio for each, ratio in zip(drawn, STRIP))
    with Image.open(io.BytesIO(studio.png(ask, drawn))) as sheet:
        assert sheet.width > 5 * sheet.height and len(json.loads(sheet.text["plan"])) == len(STRIP)
    monkeypatch.setattr(studio, "smallest", 0.4)
    *_, drawn = studio.strip(ask)
    assert [each.made.asked for each in drawn] == [f"ratio {ratio}" for ratio in ("1", "0.8", "0.65", "0.5", "0.4")]


BAD = {
    "no prompt": ({"prompt": " \n"}, "say what to draw"),
    "10,000 characters": ({"prompt": "red " * 2_500}, "at most 8,000 characters, not 10,000"),
    "a negative seed": ({"seed": "-1"}, "from 0 to 9223372036854775807"),
    "a seed too large": ({"seed": str(LARGEST_SEED + 1)}, "from 0 to 9223372036854775807"),
    "a seed of many digits": ({"seed": "9" * 10_000}, "from 0 to 9223372036854775807"),
    "a seed in words": ({"seed": "one"}, 'not "one"'),
    "no seed": ({"seed": ""}, "a seed is a whole number"),
    "half": ({"ratio": "half"}, 'above 0 and up to 1, not "half"'),
    "ratio 0": ({"ratio": "0"}, "above 0"),
    "ratio nan": ({"ratio": "nan"}, "above 0"),
    "no budget": ({"ratio": ""}, "give a ratio"),
    "steps 0": ({"steps": "0"}, "from 1 to 1000"),
    "steps 2.5": ({"steps": "2.5"}, "a whole number"),
    "memory lots": ({"memory": "lots"}, "such as 12GB"),
    "latency in bytes": ({"latency": "3GB"}, "such as 400ms"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_refused_in_one_line(name):
    given, said = BAD[name]
    with pytest.raises(ValueError) as refused:
        Ask.read(**{"prompt": RING, "ratio": "0.5", **given})
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ratio": "0.001"}, "below the smallest plan"),
        ({"ratio": "", "memory": "1kB"}, "the least is"),
        ({"prompt": "two red dogs"}, "dogs"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_drawing_goes_on(studio, given, said):
    with pytest.raises(ValueError, match=said):
        studio.draw(Ask.read(**{"prompt": RING, "ratio": "0.5", **given}))
    assert studio.draw(Ask.read(RING, ratio="0.5", steps="1")).cost.alone


def test_the_largest_seed_is_one():
    assert Ask.read(RING, seed=str(LARGEST_SEED), ratio="1").seed == LARGEST_SEED


def test_two_people_at_once_get_what_each_alone_gets():
    asks = [Ask.read(RING, seed=str(seed), ratio=ratio, steps="8") for ratio in ("0.9", "0.2") for seed in range(3)]
    alone = Studio.open(str(CHECKPOINT))
    wanted = [pixels(alone.draw(ask)) for ask in asks]
    assert len(set(wanted)) > 3
    together(Studio.open(str(CHECKPOINT)), asks, wanted)


def together(studio, asks, wanted):
    """Draw the first half of some asks in one thread and the rest in another, and compare."""
    found, ready = [None] * len(asks), threading.Barrier(2)

    def draw(numbers):
        ready.wait()
        for n in numbers:
            found[n] = studio.draw(asks[n])

    half = len(asks) // 2
    people = [threading.Thread(target=draw, args=(part,)) for part in (range(half), range(half, len(asks)))]
    for person in people:
        person.start()
    for person in people:
        person.join()
    assert [pixels(each) for each in found] == wanted
    assert not all(each.cost.alone for each in found), "they took turns: this test saw nothing"


@pytest.fixture(scope="module")
def pipeline(made, parts, tmp_path_factory):
    """A tiny random pipeline with words in the place of a text encoder, around a pluggable transformer."""
    folder = tmp_path_factory.mktemp("web") / "pipeline"
    none = {"text_encoder": None, "tokenizer": None, "transformer": None}
    QwenImagePipeline(**{**parts, **none}).save_pretrained(folder)
    shutil.copytree(made.folder, folder / "transformer")
    words.WordTable.random(["red", "ring"], 16).write(folder)
    return folder


def of_pipeline(folder):
    model = ppcl_rt.load(folder / "transformer", 1.0, dtype=torch.float32)
    task = PipelineTask(folder)
    task.usual, task.demo_prompts = How(3, 1.0, (32, 32)), (RING,)
    task.drawing(model)
    return Studio(str(folder), model, task)


def test_a_pipeline_draws_for_two_people_at_once(pipeline):
    """Autoencoders of videos keep what they saw: one that two threads share mixes their pictures up.

    Each waits for the other after it has cleared what is kept, and before it decodes.
    """
    alone = of_pipeline(pipeline)
    ratios = ("1", str(alone.smallest))
    asks = [Ask.read(RING, seed=str(seed), ratio=ratio) for ratio in ratios for seed in range(8)]
    wanted = [pixels(alone.draw(ask)) for ask in asks]
    assert len(set(wanted)) == len(wanted)
    studio, both, kept = of_pipeline(pipeline), threading.Barrier(2, timeout=60), []
    vae = studio.task.drawing(studio.model).pipe.vae

    def wait(*_):
        # Returns nothing: what a hook returns takes the place of the input.
        both.wait()

    vae.post_quant_conv.register_forward_pre_hook(wait)
    vae.decoder.register_forward_pre_hook(lambda _, args, given: kept.append(given["feat_cache"]), with_kwargs=True)
    together(studio, asks, wanted)
    assert len(set(map(id, kept))) == len(asks)


def test_unknown_words_are_drawn_with_a_note(pipeline):
    studio = of_pipeline(pipeline)
    ask = Ask.read("a red quokka", ratio="1")
    assert studio.draw(ask).picture.size == (32, 32)
    assert studio.notes(ask.prompt) == ["not known here, and left out: a, quokka"]


def test_a_folder_that_is_deleted_is_said_to_be_gone(tmp_path):
    folder = shutil.copytree(CHECKPOINT, tmp_path / "scenes")
    studio = Studio.open(str(folder), ratio=0.2)
    shutil.rmtree(folder)
    with pytest.raises((ValueError, OSError)) as refused:
        studio.draw(Ask.read(RING, ratio="1"))
    assert str(folder) in str(refused.value) and "\n" not in str(refused.value)
    assert studio.draw(Ask.read(RING, ratio="0.2", steps="1")).cost.ratio <= 0.2


def test_without_gradio_the_program_says_what_to_install(ppcl, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    status, out, err = ppcl("web", CHECKPOINT)
    assert (status, out) == (2, "") and err.strip() == "ppcl: the page needs gradio: pip install 'ppcl-rt[web]'"


@pytest.mark.parametrize("option", [("--ratio", "0.001"), ("--ratio", "2"), ("--port", "70000"), ("--device", "warp")])
def test_bad_options_are_refused_before_anything_is_served(ppcl, option):
    status, _, err = ppcl("web", CHECKPOINT, *option)
    assert status == 2 and err.strip().count("\n") == 0
