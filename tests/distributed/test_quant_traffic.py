"""What engines send in a step over a quantised base: counted bytes on sockets, on 2 and 4 ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.distributed.pool import Pool
from tests.distributed.traffic import Traffic, wide_config
from tests.distributed.training import Setup

COUNT = "tests.distributed.traffic:count_step"
LIMIT = 0.28
"""Of the bf16 bytes: 4 bits of 16, an 8-bit scale for 64 weights, and a little."""


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """LoRA over linears that outweigh all else, one micro batch a rank."""
    folder = wide_config(tmp_path_factory.mktemp("wide"))
    return Setup(str(folder), peft="lora", precision="bf16", random_weights=True)


@pytest.fixture(scope="module", params=[2, 4], ids=["ranks2", "ranks4"])
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    """Ranks whose sockets carry nothing else."""
    pool = Pool(request.param)
    yield pool
    pool.close()


def counted(pool: Pool, setup: Setup) -> Traffic:
    """The count of the first rank."""
    traffic: Traffic = pool.run(COUNT, setup=replace(setup, micros=pool.size))[0]
    return traffic


@pytest.mark.parametrize(
    ("engine", "options", "passes", "headers"),
    [
        # Gathered for the forward and for the backward, all of a block in one collective.
        ("fsdp", (), 2, 0),
        # Gathered once: DeepSpeed keeps what it needs again before 1e9 elements have passed. Each
        # parameter is a message of its own, with gloo's head of some ten bytes.
        ("zero3", (("param_persistence_threshold", 0),), 1, 4096),
    ],
    ids=["fsdp", "zero3"],
)
def test_linears_are_gathered_as_bytes(
    pool: Pool,
    setup: Setup,
    engine: str,
    options: tuple[tuple[str, object], ...],
    passes: int,
    headers: int,
) -> None:
    chosen = replace(setup, engine=engine, engine_options=options)
    plain = counted(pool, chosen)
    # Each rank of a ring sends all but one of the shares.
    share = passes * (pool.size - 1) / pool.size
    # All else that a step sends is the same, whatever the linears are kept in. So counts that
    # agree on it show that linears are gathered in just the bytes that they are kept in.
    others = plain.sent - share * plain.linears()
    assert 0 < others < plain.sent
    for quant, limit in (("nf4", LIMIT), ("int8", 0.52)):
        kept = counted(pool, replace(chosen, quant=quant))
        gathered = kept.sent - others
        assert abs(gathered - share * kept.linears()) <= headers * pool.size
        assert gathered <= limit * share * plain.linears()
        # The count would show a base that is gathered in bf16, or at another time again.
        assert kept.sent < 0.75 * plain.sent


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_ddp_reduces_the_adapters_at_once_and_sends_nothing_else(
    pool: Pool, setup: Setup, quant: str
) -> None:
    traffic = counted(pool, replace(setup, engine="ddp", quant=quant, precision="fp32"))
    gradients = sum(size for name, size in traffic.sizes.items() if "lora_" in name)
    assert gradients > 500_000
    loss = 4
    assert traffic.reduced == [gradients, loss]
    # gloo adds heads to messages, of which two collectives have some tens.
    ring = 2 * (pool.size - 1) / pool.size * gradients
    assert 0 <= traffic.sent - ring < 1024 * pool.size


def test_ddp_reduces_in_buckets_where_it_is_told_to(pool: Pool, setup: Setup) -> None:
    """The control: DDP's own reduction is counted on the sockets, and is none of ours."""
    options = (("one_bucket_mib", 0), ("bucket_mib", 1))
    chosen = replace(setup, engine="ddp", engine_options=options, precision="fp32")
    traffic = counted(pool, chosen)
    gradients = sum(size for name, size in traffic.sizes.items() if "lora_" in name)
    assert traffic.reduced == [4]
    assert traffic.sent > 2 * (pool.size - 1) / pool.size * gradients


def test_ddp_resumes_bit_for_bit_where_the_order_of_sums_is_free(pool: Pool, setup: Setup) -> None:
    """From three ranks on, an element's place in the bucket decides in which order it is added."""
    chosen = replace(setup, engine="ddp", quant="nf4", precision="fp32", steps=4, micros=pool.size)
    answer = pool.run("tests.distributed.training:resume", setup=chosen, at=2)[0]
    assert answer["resumed"] == answer["uninterrupted"]
    assert answer["equal_weights"]
