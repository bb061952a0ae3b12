"""The order of choices, sketches that are scaled by losses, and rows that are kept."""

import numpy as np
import pytest
import torch

import ppcl_rt
from ppcl_rt import Catalog, Checkpoint, Interval, LegalWidths
from ppcl_rt.planning.legal import Sketch
from ppcl_rt.planning.sketch import TENSORS, Choice, Sketches, choices, measured, select, taken


def with_bands(catalog: Catalog) -> Catalog:
    """The same catalog with losses in two bands, and a sketch."""

    def split(widths: LegalWidths) -> LegalWidths:
        return LegalWidths(
            {
                group: tuple(c._replace(bands=(0.25 * c.loss, 0.75 * c.loss)) for c in widths.of(group))
                for group in widths.groups
            }
        )

    def parts(choice):
        return {"bands": (0.25 * choice.loss, 0.75 * choice.loss)}

    changes = {
        "blocks": tuple(map(split, catalog.blocks)),
        "students": tuple(s.model_copy(update={**parts(s), "widths": split(s.widths)}) for s in catalog.students),
        "text_runs": tuple(r.model_copy(update=parts(r)) for r in catalog.text_runs),
        "edges": (0.0, 0.5, 1.0),
        "sketch": Sketch(seed=3, size=16, bands=2),
    }
    return Catalog.model_validate(catalog.model_copy(update=changes).model_dump())


@pytest.fixture(scope="module")
def catalog(mapped):
    return with_bands(mapped.catalog)


@pytest.fixture(scope="module")
def unit_rows(catalog):
    rows = np.random.default_rng(0).standard_normal((len(list(choices(catalog))), 16))
    for there in (slice(8), slice(8, 16)):
        rows[:, there] *= np.sqrt(0.25 if there.start is None else 0.75) / np.linalg.norm(
            rows[:, there], axis=1, keepdims=True
        )
    return rows.astype(np.float16)


def test_the_order_is_blocks_then_students_with_their_widths_then_text_runs(catalog):
    order = list(choices(catalog))
    assert len(order) == len(set(order))
    expected = [
        Choice("block", Interval(n, n), group, count.units)
        for n, widths in enumerate(catalog.blocks)
        for group in widths.groups
        for count in widths.of(group)[1:]
    ]
    for student in catalog.students:
        expected.append(Choice("student", student.interval))
        for group in student.widths.groups:
            expected += [Choice("student", student.interval, group, c.units) for c in student.widths.of(group)[1:]]
    expected += [Choice("text_run", run.interval) for run in catalog.text_runs]
    assert order == expected and {choice.kind for choice in order} == {"block", "student", "text_run"}


def test_rows_have_the_losses_as_squared_norms_over_all_bands_and_in_each(catalog, unit_rows):
    losses = np.array([each.loss for each in measured(catalog)])
    rows = Sketches.of(unit_rows, catalog).rows
    assert rows.dtype == np.float64 and np.allclose(np.square(rows).sum(1), losses, rtol=1e-12)
    for band, share in enumerate((0.25, 0.75)):
        near = Sketches.of(unit_rows, catalog, band).rows
        assert near.shape[1] == 8 and np.allclose(np.square(near).sum(1), share * losses, rtol=1e-12)
        assert np.allclose(near, rows[:, catalog.sketch.slice(band)], rtol=2e-3)
    with pytest.raises(ValueError, match="sketches are"):
        Sketches.of(unit_rows[1:], catalog)
    with pytest.raises(ValueError, match="sketches are None"):
        Sketches.of(unit_rows, catalog.model_copy(update={"sketch": None}))


def test_what_a_plan_takes_sums_to_its_predicted_loss(catalog, unit_rows, mapped):
    rng, order = np.random.default_rng(1), list(measured(catalog))
    for _ in range(20):
        plan = mapped.random_plan(rng, legal=True).model_copy(update={"checkpoint": catalog.fingerprint})
        rows = taken(catalog, plan)
        assert sum(order[row].loss for row in rows) == pytest.approx(catalog.loss(plan), rel=1e-12)
        sketches = Sketches.of(unit_rows, catalog)
        assert sketches.loss(rows) == pytest.approx(np.square(sum(sketches.rows[row] for row in rows)).sum())
    assert taken(catalog, catalog.dense) == [] and sketches.loss([]) == 0
    with pytest.raises(ValueError, match="skipped blocks"):
        taken(catalog, catalog.compose([(0, catalog.spec(0).full)]))
    count = catalog.blocks[0].of("heads")[1].units
    narrowed = catalog.blocks[0].full.replace(heads=count)
    fewer = catalog.model_copy(update={"blocks": (LegalWidths.only(catalog.spec(0).full), *catalog.blocks[1:])})
    plan = catalog.compose([(0, narrowed), *((n, catalog.spec(n).full) for n in range(1, len(catalog.blocks)))])
    with pytest.raises(ValueError, match="was not measured"):
        taken(fewer, plan)


def test_rows_follow_the_choices_that_are_left(catalog, unit_rows):
    smaller = catalog.model_copy(update={"students": catalog.students[1:], "text_runs": catalog.text_runs[:1]})
    kept, old = select(unit_rows, catalog, smaller), list(choices(catalog))
    for row, choice in zip(kept, choices(smaller), strict=True):
        assert np.array_equal(row, unit_rows[old.index(choice)])
    with pytest.raises(KeyError):
        select(kept, smaller, catalog)


def test_bands_share_all_buckets_in_order():
    for size, bands in ((1024, 4), (10, 3), (5, 5)):
        slices = [Sketch(seed=0, size=size, bands=bands).slice(band) for band in range(bands)]
        assert [n for each in slices for n in range(each.start, each.stop)] == list(range(size))
    with pytest.raises(ValueError, match="cannot be shared"):
        Sketch(seed=0, size=2, bands=3)


def test_a_catalog_and_its_sketch_have_the_same_bands(catalog):
    content = catalog.model_dump()
    with pytest.raises(ValueError, match="the sketch has 3 bands"):
        Catalog.model_validate({**content, "sketch": {"seed": 0, "size": 16, "bands": 3}})


def test_a_checkpoint_carries_its_sketches(catalog, unit_rows, mapped, tmp_path):
    source = Checkpoint(mapped.folder)
    tensors = {name: source.read(name) for name in source.names}
    sketches = {name: torch.from_numpy(unit_rows.copy()) for name in TENSORS}
    ppcl_rt.write_checkpoint(tmp_path / "whole", source.config, catalog, tensors | sketches)
    model = ppcl_rt.load(tmp_path / "whole", dtype=torch.bfloat16)
    assert not any("sketches" in name for name in model.state_dict())
    model.save_pretrained(tmp_path / "saved")
    saved = Checkpoint(tmp_path / "saved")
    assert saved.catalog.sketch == catalog.sketch
    for name, rows in sketches.items():
        assert saved.read(name).dtype == torch.float16 and torch.equal(saved.read(name), rows)
    ppcl_rt.write_checkpoint(tmp_path / "none", source.config, catalog, tensors)
    with pytest.raises(ValueError, match=r"no tensor sketches\.plan"):
        ppcl_rt.load(tmp_path / "none")
    cut = {name: rows[1:].contiguous() for name, rows in sketches.items()}
    ppcl_rt.write_checkpoint(tmp_path / "cut", source.config, catalog, tensors | cut)
    with pytest.raises(ValueError, match=r"sketches\.plan is"):
        ppcl_rt.load(tmp_path / "cut")
