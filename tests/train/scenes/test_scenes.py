"""The task: captions, pictures and the judge."""

import itertools

import numpy as np
import pytest
import torch

from ppcl_train.scenes import encoding, judging, language, rendering
from ppcl_train.scenes.sampling import Sampler, noise_for


def drawn(count: int, seed: int) -> list[language.Caption]:
    rng = np.random.default_rng(seed)
    return [language.draw_caption(kind, rng) for kind in itertools.islice(itertools.cycle(language.KINDS), count)]


def test_parse_undoes_str():
    for caption in drawn(2000, 0):
        assert language.Caption.parse(str(caption)) == caption
        assert len(language.words_of(str(caption))) <= language.MAX_TOKENS


def test_templates_are_far_apart():
    for names, least in ((language.SHAPES, 4), (language.GLYPHS, 3)):
        for a, b in itertools.combinations(names.values(), 2):
            assert sum(x != y for x, y in zip(a, b)) >= least, (a, b)


def test_judge_passes_every_ground_truth():
    captions = drawn(4000, 1)
    rng = np.random.default_rng(2)
    images = np.stack([rendering.render(caption, rng) for caption in captions])
    assert (judging.judge(captions, images) == 1).all()
    # Noise well inside half the distance to the nearest palette colour (0.87) changes nothing.
    assert (judging.judge(captions, images + rng.uniform(-0.4, 0.4, images.shape)) == 1).all()


def test_judge_refuses_shuffled_captions():
    captions = drawn(5_000, 3)
    rng = np.random.default_rng(4)
    images = np.stack([rendering.render(caption, rng) for caption in captions])
    shuffled = [captions[n] for n in rng.permutation(len(captions))]
    shares = judging.judge(shuffled, images)
    assert (shares == 1).mean() < 0.002
    assert shares.mean() < 0.02


@pytest.mark.parametrize("kind", language.KINDS)
def test_one_wrong_pixel_fails_strictly_and_little_softly(kind):
    rng = np.random.default_rng(5)
    caption = language.draw_caption(kind, rng)
    image = rendering.render(caption, rng)
    image[0, 0] = -image[0, 0] if caption.ground != "grey" else 1.0
    share = judging.judge([caption], image[None])[0]
    assert share < 1
    blank = np.broadcast_to(np.float32(language.GROUNDS[caption.ground]), image.shape)
    assert judging.judge([caption], blank[None])[0] == 0


def test_relation_needs_more_than_the_two_things():
    right = language.Caption.parse("a red square left of a blue ring")
    wrong = language.Caption.parse("a red square right of a blue ring")
    image = rendering.render(wrong, np.random.default_rng(0))
    assert judging.judge([right], image[None])[0] == pytest.approx(2 / 3)


def test_training_never_draws_what_is_held_out():
    rng = np.random.default_rng(6)
    trained = {str(language.training_caption(rng)) for _ in range(5000)}
    held_out = {str(caption) for caption in language.held_out_captions(400, seed=1)}
    assert len(held_out) == 2000
    assert not trained & held_out
    assert not any(language.Caption.parse(text).held_out for text in trained)


def test_held_out_captions_are_even_over_kinds_and_fixed_by_seed():
    captions = language.held_out_captions(20, seed=3)
    assert [caption.kind for caption in captions] == [kind for kind in language.KINDS for _ in range(20)]
    assert captions == language.held_out_captions(20, seed=3) != language.held_out_captions(20, seed=4)


def test_tokens_and_images_are_inverse():
    images = np.random.default_rng(7).random((3, 16, 16, 3), dtype=np.float32)
    assert np.array_equal(encoding.to_images(encoding.to_tokens(images)), images)
    # A token is a cell: the first token holds the top left 4x4 pixels.
    assert np.array_equal(encoding.to_tokens(images)[0, 0].reshape(4, 4, 3), images[0, :4, :4])


def test_batches_depend_on_their_seed_alone():
    one, same, other = (encoding.training_batch(8, (0, step), drop=0.5) for step in (1, 1, 2))
    assert torch.equal(one.latents, same.latents) and torch.equal(one.embeddings, same.embeddings)
    assert not torch.equal(one.latents, other.latents)


def test_equal_words_have_equal_vectors_everywhere():
    embeddings, mask = encoding.encode(["two red squares", "a red ring", ""])
    assert torch.equal(embeddings[0, 1], embeddings[1, 0])
    assert mask.sum(1).tolist() == [3, 2, 1]
    # The frozen embedding of a word: another value would break every checkpoint that was ever trained.
    assert embeddings[0, 1, :2].tolist() == pytest.approx([0.5355, 0.1285], abs=1e-4)


@pytest.mark.parametrize(
    "prompt",
    [
        "two red dogs",
        "red",
        "a red square at row 1",
        "two red squares at b2",
        'the text "A"',
        'the text "FAILED"',
        "a red square left of a red square",
        "four red squares and a blue ring",
        "two red squares above a blue ring",
        "a red square at b2 on white on grey",
        "",
    ],
)
def test_what_is_no_scene_is_refused_in_one_line(prompt):
    with pytest.raises(ValueError) as error:
        language.Caption.parse(prompt)
    assert "\n" not in str(error.value)


def test_score_intervals_hold_the_mean_and_shrink():
    rng = np.random.default_rng(8)
    few, many = (judging.Score.of((rng.random(n) < 0.7).astype(float)) for n in (50, 5000))
    for score in (few, many):
        assert score.strict_ci[0] <= score.strict <= score.strict_ci[1]
    width = [score.strict_ci[1] - score.strict_ci[0] for score in (few, many)]
    # Intervals shrink with the root of n: tenfold here.
    assert 5 < width[0] / width[1] < 20


def test_sampler_grid_falls_from_one_to_zero():
    times = Sampler(steps=5, shift=3.0).times()
    assert times[0] == 1 and times[-1] == 0
    assert all(a > b for a, b in itertools.pairwise(times))


def test_sampler_reaches_what_a_perfect_model_predicts():
    target = torch.linspace(-1, 1, 2 * 16 * 48).reshape(2, 16, 48)

    def model(hidden_states, **_):
        # Prompted and free halves alike, so that guidance changes nothing.
        return (target.repeat(len(hidden_states) // 2, 1, 1),)

    for guidance in (1.0, 2.0):
        out = Sampler(steps=4, guidance=guidance).sample(model, ["two red squares", ""], noise_for(2, 0))
        assert torch.allclose(out, target, atol=1e-5)


def test_noise_of_a_sample_does_not_depend_on_how_many_are_drawn():
    assert torch.equal(noise_for(3, 5), noise_for(10, 5)[:3])
