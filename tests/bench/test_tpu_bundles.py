"""Static cycles: a matrix product whose steps, copies and products are known, and loops and branches written by hand."""

from pathlib import Path

import pytest

from bench import tpu_bundles, tpu_report, tpu_schedule

DUMP = Path(__file__).parent / "tpu_dump"
UNITS = "== CAPACITY:\nMATMUL, SALU\n 4 2\n== UTILIZATION:\n"
# A loop of 3 steps, with a body of 2 bundles in the first step alone, and one of 1 bundle where operand 0 says so. No delay slots.
LISTING = """
     0   :  { %s1_s0 = smov.u32 0 }
   0x1 LB: > { %s2_s0 = sphi %s1_s0, %s3_s0  ;;  %p1_p0 = scmp.ne.s32.totalorder %s2_s0, 0 }
   0x2   : > { %9 = sbr.rel (%p1_p0) target bundleno = 5 (0x5), region = 1 }
   0x3   : > { %10 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s9_s9, /*size_in_granules=*/64, /*vmem=*/%s8_s8 }
   0x4   : > {}
   0x5 PF: > { %s4_s4 = sld [smem:[#allocation4 + %s2_s0]]  ;;  %p2_p0 = scmp.eq.s32.totalorder %s4_s4, 0 }
   0x6   : > { %11 = sbr.rel (%p2_p0) target bundleno = 8 (0x8), region = 2 }
   0x7   : > {}
   0x8 PF: > { %s3_s0 = sadd.s32 1, %s2_s0  ;;  %p3_p0 = scmp.ge.s32.totalorder %s3_s0, 3 }
   0x9   : > { %12 = sbr.rel (!%p3_p0) target bundleno = 1 (0x1), region = 3 }
   0xa   :  {}
"""
TREE = "  #allocation4 [shape = 'u8[1024]{0}', space=smem, tag = 'prefetched SMEM operand 0']"


def by_hand(listing=LISTING):
    return tpu_bundles.parse("by hand", listing, UNITS + "1 0\n" * listing.count("{"), TREE, 0)


def test_a_product_of_known_size():
    (program,) = tpu_bundles.programs(DUMP, 4)
    counts = tpu_bundles.run(program)
    assert program.name == "product.1" and counts.by_data == counts.endless == 0
    # 128 x 128 x 256 multiply-adds on units of 128 x 128 that take a row a cycle.
    assert counts.units["MATMUL"] == 256
    assert counts.mxu == 256 / (4 * counts.cycles)
    assert counts.read == 2 * 128 * 256 * 2
    assert counts.written == 128 * 128 * 4
    # The product's 128 pops of results are in the loop, in steps 0 and 1; the bundles around the loop run once.
    assert counts.cycles > program.bundles


def test_steps_branches_and_copies():
    counts = tpu_bundles.run(by_hand(), [[0, 1, 1]])
    assert counts.cycles == 1 + 3 * 6 + 2 + 2 * 1 + 1
    assert counts.least_cycles == counts.cycles
    assert counts.read == 64 * tpu_bundles.GRANULE


def test_what_data_decides_is_counted_as_both():
    counts = tpu_bundles.run(by_hand())
    assert (counts.by_data, counts.endless) == (1, 0)
    assert counts.cycles == counts.least_cycles + 3
    endless = tpu_bundles.run(by_hand(LISTING.replace("%s3_s0, 3 }", "%s5_s5, 3 }")))
    assert endless.endless == 1


def test_a_format_that_it_does_not_know_is_refused():
    with pytest.raises(ValueError, match="branch of unknown form"):
        by_hand(LISTING.replace("sbr.rel (!%p3_p0) target bundleno", "sbr.ind (!%p3_p0) to"))
    with pytest.raises(ValueError, match="numbered"):
        by_hand(LISTING.replace("0x4 ", "0x6 "))


def test_what_is_written_says_that_it_is_static_and_what_failed(tmp_path):
    result = dict(cycles=100, least=90, per_unit=10.0, copies=50.0, bytes=1e6, mxu=0.5, products=0.4, unknown=0, note="")
    contenders = {"dlm_kernels": result, "splash": result | dict(cycles=200)}
    row = dict(unit="tile", units=10, commit="c", least_bytes=1e6, least_copies=50.0, contenders=contenders)
    rows = [row | dict(case="attention"), row | dict(case="lm_head_scores")]
    rows.append(row | dict(case="attention too", contenders={"splash": dict(missing="too small", note="")}))
    tpu_schedule.write(tmp_path / "tpu-static-v5e.json", "v5e", {"jax": "0", "libtpu": "0"}, rows)
    text = (tmp_path / "tpu-static-v5e.md").read_text()
    assert tpu_report.LIMITS in text and "(least 90)" in text and "| 0.50 |" in text and "not compiled: too small" in text
    text = tpu_report.readme(tmp_path)
    assert "| attention | 0.50 |" in text and "| attention too | – |" in text and "| lm_head_scores | 2.00 |" in text


def counted(cycles, copies, products=0.5):
    told = dict(least=cycles, per_unit=1.0, mxu=0.5, unknown=0, note="")
    return told | dict(cycles=cycles, copies=copies, bytes=2e4 * copies, products=products)


# Of cycles that copies hide nobody is faster for having fewer; a copy too small to be one hides none.
@pytest.mark.parametrize(
    "ours, splash, flash, ratio",
    [
        ((20, 100), (40, 100), (60, 100), 1.0),
        ((90, 60), (200, 60), (120, 60), 0.75),
        ((90, 10), (30, 10), (100, 10), 1.8),  # 50 at least for the operands and results of all
        ((40, 10), (45, 50), (45, 60), 1.0),
        ((90, 60), (100, 60, 1.2), (120, 60), 0.75),
        ((90, 60, 1.01), (100, 60), (120, 60), None),
    ],
)
def test_ours_is_compared_with_the_better_peer_by_the_larger_of_cycles_and_copies(ours, splash, flash, ratio):
    names = ("dlm_kernels", "splash", "flash")
    contenders = {name: counted(*each) for name, each in zip(names, (ours, splash, flash))}
    row = dict(case="attention", unit="tile", units=1, least_bytes=1e6, least_copies=50.0, contenders=contenders)
    assert tpu_report.ratio(row, "splash", "flash") == (ratio and pytest.approx(ratio))


def test_a_count_that_cannot_be_is_refused():
    contenders = {"dlm_kernels": counted(90, 10), "XLA": counted(100, 60, 1.43)}
    row = dict(case="attention", unit="tile", units=1, commit="c", least_bytes=1e6, least_copies=50.0, contenders=contenders)
    text = tpu_report.table(dict(chip="v5e", clock=1e9, bandwidth=1e9, versions={}, rows=[row]))
    assert "| – | refused: 0.2 of 1.0 |" in text and "| XLA | refused: 100 cycles, of which the products alone take 143% |" in text
    assert "ours" not in tpu_report.line(row) and "XLA refused" in tpu_report.line(row)
