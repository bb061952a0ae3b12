"""Words in the place of a text encoder."""

import pytest
import torch

from ppcl_rt.pipelines.words import FILE, MOST_WORDS, WordTable, words_of


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("woman firefighter: medium-dark skin tone", ["woman", "firefighter", "medium-dark", "skin", "tone"]),
        ("  Côte d\u2019Ivoire ", ["cote", "divoire"]),
        ("man's SHOE; keycap: #", ["mans", "shoe", "keycap", "#"]),
        ("-- ! ?", []),
    ],
)
def test_case_accents_and_signs_do_not_matter(prompt, words):
    assert words_of(prompt) == words


def test_a_table_is_read_as_it_was_written(tmp_path):
    table = WordTable.random(["a", "red", "owl"], 8)
    table.write(tmp_path)
    read = WordTable.read(tmp_path)
    assert read.words == table.words and torch.equal(read.embeddings, table.embeddings)
    known = read.embed("Red owl")
    assert torch.equal(known.embeddings, table.embeddings[[2, 3]]) and known.unknown == () and not known.cut
    # What is not known is left out and said; a prompt without any word has a row of its own.
    odd = read.embed("a purple owl purple")
    assert torch.equal(odd.embeddings, table.embeddings[[1, 3]]) and odd.unknown == ("purple", "purple")
    assert torch.equal(read.embed("!").embeddings, table.embeddings[[0]])
    assert read.embed("owl " * (MOST_WORDS + 1)).cut and not read.embed("owl " * MOST_WORDS).cut


def test_prompts_of_a_batch_are_padded():
    table = WordTable.random(["red", "owl"], 4)
    embeddings, mask = table.batch(["red owl", "owl"])
    assert embeddings.shape == (2, 2, 4) and mask.tolist() == [[True, True], [True, False]]
    assert torch.equal(embeddings[1], torch.stack([table.embeddings[2], torch.zeros(4)]))


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_a_damaged_table_is_refused_in_one_line(tmp_path, damage):
    if damage != "missing":
        WordTable.random(["red"], 4).write(tmp_path)
        content = (tmp_path / FILE).read_bytes()
        (tmp_path / FILE).write_bytes(content[:40] if damage == "cut" else content.replace(b"words", b"wards"))
    with pytest.raises(ValueError, match="is no table of words") as raised:
        WordTable.read(tmp_path)
    assert "\n" not in str(raised.value)
