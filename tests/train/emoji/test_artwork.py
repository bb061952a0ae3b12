"""Names of emoji, their pictures, and the judge."""

from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage

from ppcl_rt.pipelines.words import words_of
from ppcl_train.emoji.artwork import artwork
from ppcl_train.emoji.captions import Caption
from ppcl_train.emoji.judging import Judge, Share
from ppcl_train.families import emoji_autoencoder


@pytest.fixture(scope="module")
def art():
    return artwork()


@pytest.mark.parametrize(
    ("name", "text", "role", "gender", "tones"),
    [
        (":red_apple:", "red apple", "red apple", (), ()),
        (
            ":woman_firefighter_medium-dark_skin_tone:",
            "woman firefighter: medium-dark skin tone",
            "firefighter",
            ("woman",),
            ("medium-dark",),
        ),
        (":person_dark_skin_tone_bald:", "person bald: dark skin tone", "bald", ("person",), ("dark",)),
        (
            ":kiss_woman_man_light_skin_tone_dark_skin_tone:",
            "kiss woman man: light skin tone, dark skin tone",
            "kiss",
            ("woman", "man"),
            ("light", "dark"),
        ),
        (":light_skin_tone:", "light skin tone", "", (), ("light",)),
        (":light_bulb:", "light bulb", "light bulb", (), ()),
    ],
)
def test_a_name_is_taken_apart(name, text, role, gender, tones):
    caption = Caption.of(name)
    assert (caption.text, caption.role, caption.gender, caption.tones) == (text, role, gender, tones)


def test_one_in_ten_of_those_with_one_tone_is_held_out(art):
    held_out = [caption for caption in art.captions if caption.held_out]
    one_tone = [caption for caption in art.captions if len(caption.tones) == 1]
    assert len(art.captions) == 3953 and len(set(art.captions)) == 3953
    assert set(held_out) <= set(one_tone) and 0.08 < len(held_out) / len(one_tone) < 0.12
    # Each part of a held-out name was seen; the whole was not.
    trained = [caption for caption in art.captions if not caption.held_out]
    assert {caption.role for caption in held_out} <= {caption.role for caption in trained}
    words = Counter(word for caption in trained for word in words_of(caption.text))
    assert all(words[word] for caption in held_out for word in words_of(caption.text))


def test_different_names_have_different_words(art):
    """Else a prompt could not say which is meant; the judge lets those with one picture pass for each other."""
    said = Counter(tuple(words_of(caption.text)) for caption in art.captions)
    assert [words for words, count in said.items() if count > 1] == []


def test_the_judge_passes_originals_and_no_others(art):
    judge = Judge(art)
    verdicts = judge.judge(art.captions, art.pictures)
    assert verdicts.exact.all() and verdicts.top_5.all() and verdicts.role.all() and verdicts.tone.all()
    # The pictures of others, among them the same thing in other tones.
    moved = judge.judge(art.captions, np.roll(art.pictures, 1, 0))
    assert moved.exact.mean() < 0.06 and 0.1 < moved.role.mean() < 0.9 and moved.tone.mean() < 0.7
    noise = np.random.default_rng(0).integers(0, 256, size=(50, 64, 64, 3), dtype=np.uint8)
    assert judge.judge(art.captions[:50], noise).exact.mean() < 0.1


def test_an_interval_holds_the_share():
    share = Share.of(np.arange(200) % 4 == 0)
    assert share.mean == 0.25 and 0.18 < share.low < 0.25 < share.high < 0.32
    assert Share.of(np.ones(10, dtype=bool)) == (1.0, 1.0, 1.0)


def test_two_dimensions_are_the_last_taps_of_three():
    torch.manual_seed(0)
    flat = emoji_autoencoder.flattened(AutoencoderKLQwenImage(**{**emoji_autoencoder.ARCHITECTURE, "base_dim": 4}))
    flat.register_to_config(latents_mean=[0.5] * 16, latents_std=[2.0] * 16)
    whole = emoji_autoencoder.whole(flat)
    assert whole.config.latents_mean == [0.5] * 16 and whole.config.latents_std == [2.0] * 16
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        latents = whole.encode(x[:, :, None]).latent_dist.parameters[:, :, 0]
        assert torch.allclose(emoji_autoencoder.encoded(flat, x), latents, atol=1e-5)
        pixels = whole.decode(latents[:, :16, None]).sample[:, :, 0]
        assert torch.allclose(emoji_autoencoder.decoded(flat, latents[:, :16]).clamp(-1, 1), pixels, atol=1e-5)
    assert pixels.std() > 1e-2
