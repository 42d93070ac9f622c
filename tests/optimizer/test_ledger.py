"""The ledger's sums: launches into kernels, kernels per layer, bytes over the least possible."""

import dataclasses

import pytest

from torchweld.optimizer.ledger import (
    Fallback,
    LaunchRecord,
    Ledger,
    PassRecord,
    RefusalRecord,
    bytes_over_minimum,
    kernels_per_layer,
    merge_runs,
)


def launch(
    kernel: str, layer: int | None, moved: int = 100, minimum: int = 100, measured: float | None = None
) -> LaunchRecord:
    return LaunchRecord(
        kernel, ("row",), layer, moved, minimum, 10, 2.0, measured, sources=(f"m.py:{layer}",)
    )


def test_launches_of_one_kernel_are_summed() -> None:
    ledger = Ledger(launches=[launch("norm", 0, 110), launch("head", None), launch("norm", 1, 130)])
    norm, head = ledger.kernels()
    assert (norm.name, norm.uses, norm.layers) == ("norm", 2, (0, 1))
    assert (norm.bytes_moved, norm.bytes_minimum, norm.flops, norm.modelled_us) == (240, 200, 20, 4.0)
    assert norm.sources == ("m.py:0", "m.py:1")
    assert (head.uses, head.layers) == (1, (None,))


def test_measured_sum_needs_every_launch_measured() -> None:
    complete = Ledger(launches=[launch("norm", 0, measured=3.0), launch("norm", 1, measured=4.0)])
    partial = Ledger(launches=[launch("norm", 0, measured=3.0), launch("norm", 1)])
    assert complete.kernels()[0].measured_us == 7.0
    assert partial.kernels()[0].measured_us is None


def test_kernels_per_layer_is_that_of_the_worst_layer() -> None:
    launches = [launch("a", 0), launch("b", 0), launch("a", 1), *[launch("x", None)] * 9]
    assert kernels_per_layer(launches) == 2
    assert kernels_per_layer(launches, [Fallback("sort", "no kernel", layer=1)] * 3) == 4


def test_without_layers_all_launches_count() -> None:
    assert kernels_per_layer([launch("a", None), launch("b", None)], [Fallback("sort", "no kernel")]) == 3
    assert kernels_per_layer([]) == 0


def test_bytes_over_minimum_does_not_hide_a_layer_behind_the_head() -> None:
    launches = [launch("a", 0, 100, 100), launch("a", 1, 150, 100), launch("head", None, 10_000, 10_000)]
    assert bytes_over_minimum(launches) == 1.5
    assert bytes_over_minimum([launch("head", None, 120, 100), launch("a", 0, 100, 100)]) == pytest.approx(
        1.1
    )
    assert bytes_over_minimum([]) == 1.0
    assert bytes_over_minimum([launch("empty", None, 0, 0)]) == 1.0


def test_reasons_are_counted() -> None:
    refused = (RefusalRecord("b"), RefusalRecord("a", count=2), RefusalRecord("b", count=4))
    record = PassRecord("p", "exact", 8, refused, 1)
    assert record.reasons() == (("b", 5), ("a", 2))
    assert record.refused_sites == 7


def test_records_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        launch("a", 0).flops = 1  # type: ignore[misc]


def test_runs_of_one_pass_are_merged() -> None:
    runs = [
        PassRecord("views", "exact", 5, (RefusalRecord("shape"),), 4, milliseconds=1.0, error_added=1e-8),
        PassRecord("linear", "reassoc", 1, (), 1),
        PassRecord("views", "exact", 3, (), 3, milliseconds=2.0, kept=False),
    ]
    views, linear = merge_runs(runs)
    assert (views.runs, views.matched, views.applied, views.refused) == (2, 7, 7, ())
    assert (views.milliseconds, views.kept, views.error_added) == (3.0, False, None)
    assert linear == runs[1]
