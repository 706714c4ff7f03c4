"""Which image comes when: shares, passes, buckets, subsets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biovfm_monai.data.mixture import Labels, Mixture, permute, subset
from biovfm_monai.errors import InputError


def labels(*counts, prefix="s"):
    """A column with so many images of each name, shuffled."""
    names = [f"{prefix}{n}" for n, count in enumerate(counts) for _ in range(count)]
    return Labels.of(np.random.default_rng(0).permutation(names))


@given(size=st.integers(1, 3000), key=st.integers(0, 2**63))
@settings(max_examples=60, deadline=None)
def test_a_permutation_reaches_every_place_once(size, key):
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def test_permutations_of_neighbouring_keys_are_unlike_each_other_and_the_identity():
    size = 1000
    orders = [np.arange(size), *(permute(np.arange(size), size, key) for key in range(20))]
    # The share of points that two random permutations of 1000 have in common has mean 1/1000.
    common = [(a == b).mean() for n, a in enumerate(orders) for b in orders[:n]]
    assert max(common) < 0.01
    correlations = [abs(np.corrcoef(a, b)[0, 1]) for n, a in enumerate(orders) for b in orders[:n]]
    assert max(correlations) < 0.15


@pytest.mark.parametrize("size", [5, 16, 17])
def test_every_place_is_equally_likely_over_many_keys(size):
    keys = np.arange(20_000)
    for index in (0, size // 2, size - 1):
        counts = np.bincount(permute(index, size, keys), minlength=size)
        chi_square = ((counts - 20_000 / size) ** 2 / (20_000 / size)).sum()
        assert chi_square < size + 6 * np.sqrt(2 * size)


def test_without_weights_each_pass_shows_every_image_once_in_an_order_of_its_own():
    mixture = Mixture(labels(7, 40, 3), seed=1)
    passes = [mixture.rows(np.arange(50 * n, 50 * n + 50)) for n in range(4)]
    assert all(np.array_equal(np.sort(rows), np.arange(50)) for rows in passes)
    assert len({tuple(rows) for rows in passes}) == 4


def test_a_sample_is_the_same_alone_in_a_batch_and_after_a_restart():
    mixture = Mixture(labels(9, 100), batch_size=8, temperature=2)
    together = Mixture(labels(9, 100), batch_size=8, temperature=2).rows(np.arange(400))
    assert [int(mixture.rows([n])[0]) for n in reversed(range(400))] == together[::-1].tolist()
    other = Mixture(labels(9, 100), batch_size=8, temperature=2, seed=1)
    assert not np.array_equal(other.rows(np.arange(400)), together)


@pytest.mark.parametrize("temperature", [0.5, 1, 2, 1e9])
@pytest.mark.parametrize("buckets", [None, (70, 60, 20)])
def test_sources_and_modalities_come_in_the_shares_asked_for(temperature, buckets):
    source, modality = labels(100, 30, 20), labels(50, 100, prefix="m")
    weights = {"source_weights": {"s1": 3.0}, "modality_weights": {"m0": 0.5}}
    bucket = None if buckets is None else labels(*buckets, prefix="b")
    mixture = Mixture(source, modality, bucket, batch_size=4, temperature=temperature, **weights)
    sizes = np.array([100, 30, 20])[source.codes]
    share = sizes ** (1 / temperature - 1) * np.array([1, 3, 1])[source.codes] * np.array([0.5, 1])[modality.codes]
    rows = mixture.rows(np.arange(200_000))
    for column in (source, modality):
        seen = np.bincount(column.codes[rows]) / len(rows)
        asked = np.bincount(column.codes, weights=share) / share.sum()
        assert np.abs(seen - asked).max() < 0.01
        assert np.abs(seen / asked - 1).max() < 0.03


def test_a_small_source_that_is_raised_shows_its_images_equally_often_and_a_large_one_shows_none_twice():
    source = labels(5, 600)
    rows = Mixture(source, temperature=1e9).rows(np.arange(605))
    counts = np.bincount(rows, minlength=605)
    assert abs(int(counts[source.codes == 0].sum()) - 302.5) < 1
    assert np.ptp(counts[source.codes == 0]) <= 1
    assert counts[source.codes == 1].max() == 1


@pytest.mark.parametrize("batch_size", [1, 6])
def test_a_batch_is_of_one_bucket_and_every_image_has_its_turn(batch_size):
    bucket = labels(90, 7, 3, prefix="b")
    mixture = Mixture(labels(60, 40), bucket=bucket, batch_size=batch_size)
    batches = mixture.rows(np.arange(6000)).reshape(-1, batch_size)
    assert all(len(set(bucket.codes[rows])) == 1 for rows in batches)
    assert set(batches.flat) == set(range(100))


def test_what_has_no_weight_never_comes():
    source, modality = Labels.of(["s0", "s1"] * 10), Labels.of(["m0"] * 9 + ["m1"] * 11)
    mixture = Mixture(source, modality, source_weights={"s0": 0}, modality_weights={"m1": 0})
    rows = mixture.rows(np.arange(500))
    assert set(source.codes[rows]) == {1}
    assert set(modality.codes[rows]) == {0}
    assert len(mixture) == len(set(rows))


def test_images_in_place_of_others_are_of_their_bucket_in_the_same_shares():
    source, bucket = labels(300, 60, 20), labels(200, 150, 30, prefix="b")
    weights = {"temperature": 2.0, "source_weights": {"s1": 3.0, "s2": 0.0}}
    mixture = Mixture(source, bucket=bucket, batch_size=4, **weights)
    numbers = np.arange(40_000)
    first, second, third = (mixture.rows(numbers, attempt) for attempt in range(3))
    for other in (second, third):
        assert np.array_equal(bucket.codes[other], bucket.codes[first])
        assert (source.codes[other] == 1).mean() == pytest.approx((source.codes[first] == 1).mean(), abs=0.01)
        assert not (source.codes[other] == 2).any()
        assert len(set(other)) == len(mixture)
    assert (first == second).mean() < 0.05
    assert [int(mixture.rows([n], 1)[0]) for n in (5, 3000, 77)] == second[[5, 3000, 77]].tolist()
    other = Mixture(source, bucket=bucket, batch_size=4, seed=1, **weights)
    assert (other.rows(numbers, 1) == second).mean() < 0.05


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5), small=st.floats(0.01, 1), large=st.floats(0.01, 1),
    seed=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_small_share_of_the_images_lies_inside_a_large_one(sizes, small, large, seed):
    source = labels(*sizes)
    small, large = sorted((small, large))
    inner, outer = subset(source, small, seed), subset(source, large, seed)
    assert (outer | ~inner).all()
    for code, size in enumerate(sizes):
        assert inner[source.codes == code].sum() == max(np.rint(small * size), 1)
    assert subset(source, 1.0, seed).all()


@given(
    known=st.lists(st.integers(0, 12), min_size=1, max_size=60), small=st.floats(0.01, 1), large=st.floats(0.01, 1),
    seed=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_share_of_the_subjects_has_all_their_images_and_lies_inside_a_larger_one(known, small, large, seed):
    source = Labels.of([str(number % 2) for number in range(len(known))])
    # Both sources have subjects of the same names, and images of unknown ones.
    subject = Labels.of(["" if number == 0 else f"patient {number}" for number in known])
    small, large = sorted((small, large))
    inner, outer = subset(source, small, seed, subject), subset(source, large, seed, subject)
    assert (outer | ~inner).all()
    who = [(n % 2, number or f"image {n}") for n, number in enumerate(known)]
    kept = {one for one, keep in zip(who, inner, strict=True) if keep}
    assert [one in kept for one in who] == inner.tolist()
    for code in range(len(source.names)):
        count = len({one for one in who if one[0] == code})
        assert len({one for one in kept if one[0] == code}) == max(np.rint(small * count), 1)


def test_another_seed_chooses_other_images():
    assert not np.array_equal(subset(labels(100), 0.3, 0), subset(labels(100), 0.3, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature 0 must be above 0"),
        ({"temperature": float("nan")}, "temperature nan must be above 0"),
        ({"source_weights": {"elsewhere": 1}}, "no source 'elsewhere' to weigh. Give one of s0, s1"),
        ({"source_weights": {"s0": -1}}, r"weight -1 of source 's0' must be 0 or more"),
        ({"source_weights": {"s0": 0, "s1": 0}}, "all images have weight 0"),
    ],
)
def test_weights_that_mean_nothing_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Mixture(labels(3, 4), **options)


def test_no_image_and_no_share_are_refused():
    with pytest.raises(InputError, match="no image to sample from"):
        Mixture(Labels.of([]))
    for fraction in (0, -1, 1.5, float("nan")):
        with pytest.raises(InputError, match=r"fraction .* must be above 0 and at most 1"):
            subset(labels(3), fraction)
