"""Which latents a specification means."""

import numpy as np
import pytest
from jobs_standins import Source

from autointerp.errors import InputError
from autointerp.jobs.latents import choose_latents, hash_order

STATISTICS = Source().statistics("a")


def chosen(spec, seed=0):
    return choose_latents(spec, STATISTICS, seed=seed).tolist()


def test_ranges_and_lists():
    assert chosen("3-6") == [3, 4, 5, 6]
    assert chosen("9, 7,3") == [3, 7, 9]
    assert chosen("0-2,2,8") == [0, 1, 2, 8]
    assert chosen("55") == [55]  # silent, but named
    assert chosen((4, 1, 4)) == [1, 4]


def test_all_means_live():
    assert chosen("all") == list(range(50))


def test_random_grows_by_addition_and_takes_only_live_latents():
    ten, twenty, everything = chosen("random:10"), chosen("random:20"), chosen("random:500")
    assert len(ten) == 10
    assert set(ten) < set(twenty) < set(everything)
    assert everything == list(range(50))
    assert chosen("random:10", seed=1) != ten


def test_density_narrows():
    # The latent i fires on 100 (i + 1) / 1e6 of the tokens.
    assert chosen("density:1e-3..1.2e-3") == [9, 10, 11]
    assert set(chosen("random:2,density:1e-3..1.2e-3")) < {9, 10, 11}
    assert chosen("density:..1.5e-4") == [0]


def test_list_file(tmp_path):
    path = tmp_path / "latents.txt"
    path.write_text("coder,latent\na,3\nb,4\n# a comment\n5\na/6\n")
    assert chosen(str(path)) == [3, 5, 6]
    path.write_text("3\nx y z\n")
    with pytest.raises(InputError, match=r"line 2: 'x y z' is not a latent"):
        chosen(str(path))


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("60", "has no latent 60; it has 60, 0 to 59"),
        ("0-99", "has no latent 99; it has 60, 0 to 59"),
        ("9-3", "write 3-9"),
        ("randon:5", "cannot be read; expected forms such as 0-99"),
        ("random:x", "expected a count after random:"),
        ("density:2..1", "expected density:LOW..HIGH"),
        ("density:0.5..0.6", "its live latents fire on 1.0e-04 to 5.0e-03 of the tokens"),
        ("", "names no latent"),
    ],
)
def test_sentences(spec, sentence):
    with pytest.raises(InputError, match=sentence):
        chosen(spec)


def test_result_type():
    assert choose_latents("1", STATISTICS, seed=0).dtype == np.int64


def test_at_most_takes_the_first_of_the_seeded_order_and_leaves_what_is_named_by_number():
    def limited(spec):
        return choose_latents(spec, STATISTICS, seed=0, at_most=8).tolist()

    assert limited("all") == limited("random:20") == chosen("random:8")
    assert limited("random:5") == chosen("random:5")
    assert limited("density:..0.003") == chosen("density:..0.003,random:8") and len(limited("density:..0.003")) == 8
    assert limited("0-20") == list(range(21)) and limited(tuple(range(9))) == list(range(9))
    assert limited("0-20,all") == sorted({*range(21), *chosen("random:8")})


def test_the_order_is_that_of_random():
    order = hash_order(STATISTICS, seed=3)
    assert sorted(order.tolist()) == list(range(50))
    assert sorted(order[:7].tolist()) == chosen("random:7", seed=3)
