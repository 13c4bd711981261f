"""What is read from a compiled program: each collective as often as it runs, and the bytes of memory."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding

from gla_jax.parallel.program import Collective, read_collectives, read_kernels, read_memory, summarize

P = jax.P


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)


def compile_on(mesh: jax.sharding.Mesh, function, size: int, **options) -> jax.stages.Compiled:
    x = jax.ShapeDtypeStruct((size,), jnp.float32, sharding=NamedSharding(mesh, P(("a", "b"))))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=P(("a", "b")), out_specs=P(("a", "b")), check_vma=False)
    return jax.jit(mapped, **options).lower(x).compile()


def test_every_kind_is_counted_as_often_as_it_runs(mesh: jax.sharding.Mesh) -> None:
    def talk(x: jax.Array) -> jax.Array:  # [8] floats on each device
        def outer(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            inner = lambda x, _: (jax.lax.psum(x, "b"), None)
            x, _ = jax.lax.scan(inner, x, None, length=3)
            return jax.lax.ppermute(x, "a", [(0, 1), (1, 0)]), None

        x, _ = jax.lax.scan(outer, x, None, length=5)
        x = jax.lax.all_gather(x, "b", tiled=True)  # [32]
        x = jax.lax.psum_scatter(x, ("a", "b"), tiled=True)  # [4]
        return jax.lax.all_to_all(x, "b", 0, 0, tiled=True)

    found = read_collectives(compile_on(mesh, talk, 64).as_text())
    facts = [(each.kind, each.bytes, each.group_size, each.count, each.overlapped) for each in found]
    assert facts == [
        ("all-reduce", 8 * 4, 4, 15, False),
        ("collective-permute", 8 * 4, 8, 5, False),
        ("all-gather", 32 * 4, 4, 1, False),
        ("reduce-scatter", 32 * 4, 8, 1, False),
        ("all-to-all", 4 * 4, 4, 1, False),
    ]
    assert found[0].name.endswith("psum")
    assert summarize(found) == {
        "all-gather": {"count": 1, "bytes_sent": 96, "bytes_sent_overlapped": 0},
        "reduce-scatter": {"count": 1, "bytes_sent": 112, "bytes_sent_overlapped": 0},
        "all-reduce": {"count": 15, "bytes_sent": 15 * 2 * 24, "bytes_sent_overlapped": 0},
        "all-to-all": {"count": 1, "bytes_sent": 12, "bytes_sent_overlapped": 0},
        "collective-permute": {"count": 5, "bytes_sent": 160, "bytes_sent_overlapped": 0},
    }


def test_a_program_of_one_device_has_none() -> None:
    assert read_collectives(jax.jit(jnp.sin).lower(jnp.ones(8)).compile().as_text()) == []


def program(*instructions: str, others: str = "") -> str:
    return "\n".join([others, "ENTRY %main (x: f32[64,128]) -> f32[] {", *(f"  {line}" for line in instructions), "}"])


GROUPS = "replica_groups=[2,4]<=[8]"
START = f"%s = (f32[64,128]{{1,0}}, f32[256,128]{{1,0:T(8,128)}}) all-gather-start(%x), channel_id=1, {GROUPS}"
DONE = "%d = f32[256,128]{1,0} all-gather-done(%s)"
WORK = "%f = f32[64,128]{1,0} fusion(%x), kind=kLoop, calls=%square"
SQUARE = "%square (p: f32[64,128]) -> f32[64,128] {\n  ROOT %m = f32[64,128]{1,0} multiply(%p, %p)\n}"


@pytest.mark.parametrize(
    ("order", "overlapped"),
    [
        ((START, WORK, DONE), True),
        ((START, DONE, WORK), False),
        ((WORK, START, DONE), False),
        ((START, "%i = s32[] fusion(%n), kind=kLoop, calls=%square", DONE), False),  # a counter takes no time
        ((START, "%c = f32[64,128]{1,0} copy(%x)", DONE), False),
    ],
)
def test_overlap_is_work_between_start_and_done(order: tuple[str, ...], overlapped: bool) -> None:
    (found,) = read_collectives(program(*order, others=SQUARE))
    assert found == Collective("all-gather", 256 * 128 * 4, 4, 1, overlapped, "")
    assert found.sent == 192 * 128 * 4


def test_asynchronous_wrappers_and_all_reduces_are_read() -> None:
    wrapped = (
        f"%wrapped (p: bf16[64,128]) -> bf16[16,128] {{\n"
        f"  ROOT %r = bf16[16,128]{{1,0}} reduce-scatter(%p), {GROUPS}\n}}\n{SQUARE}"
    )
    text = program(
        "%s = ((bf16[64,128]{1,0}), bf16[16,128]{1,0}, u32[]) async-start(%x), calls=%wrapped",
        "%t = (f32[8]{0}, bf16[4]{0}) all-reduce-start(%y, %z), replica_groups={{0,1},{2,3}}",
        WORK,
        "%d = bf16[16,128]{1,0} async-done(%s)",
        "%e = (f32[8]{0}, bf16[4]{0}) all-reduce-done(%t)",
        others=wrapped,
    )
    assert read_collectives(text) == [
        Collective("reduce-scatter", 64 * 128 * 2, 4, 1, True, ""),
        Collective("all-reduce", 8 * 4 + 4 * 2, 2, 1, True, ""),
    ]


def test_the_fusions_of_tpus_are_read() -> None:
    """Start, a part beside a product in a loop, and end hold the same all-gather; a sum that is sliced is a scatter."""
    gather = "bf16[1024,512]{1,0} all-gather(%p), channel_id=9, replica_groups=mesh['data'=1,'fsdp'=16] {'fsdp'}, "
    gather += 'dimensions={0}, frontend_attributes={chain_id="7"}, metadata={op_name="jit(step)/head"}'
    others = f"""
%start (p: bf16[64,512]) -> (bf16[64,512], bf16[1024,512]) {{
  %g = {gather}
  ROOT %c = (bf16[64,512], bf16[1024,512]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}
%async_collective_fusion.3 (p: bf16[64,512]) -> bf16[1024,512] {{
  %g.2 = {gather}
  ROOT %k = bf16[1024,512]{{1,0}} convolution(%g.2, %g.2)
}}
%end (p: bf16[64,512]) -> bf16[1024,512] {{
  %g.3 = {gather}
  ROOT %c.2 = bf16[1024,512]{{1,0}} custom-call(%g.3), custom_call_target="AsyncCollectiveDone"
}}
%all-reduce-scatter.1 (p: f32[2048,512]) -> f32[128,512] {{
  %a = f32[2048,512]{{1,0}} all-reduce(%p), channel_id=3, replica_groups=mesh['axis_0'=16] {{'axis_0'}}
  ROOT %ds = f32[128,512]{{1,0}} dynamic-slice(%a, %i)
}}
%condition (t: (s32[], bf16[64,512])) -> pred[] {{
  %limit = s32[]{{:T(128)}} constant(24), metadata={{op_name="lt"}}
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}}
%body (t: (s32[], bf16[64,512])) -> (s32[], bf16[64,512]) {{
  %b = bf16[1024,512]{{1,0}} fusion(%q), kind=kOutput, calls=%async_collective_fusion.3
  %o = f32[128,512]{{1,0:T(8,128)S(1)}} fusion(%q), kind=kCustom, calls=%all-reduce-scatter.1
}}"""
    text = program(
        "%as = (bf16[64,512], /*index=1*/bf16[1024,512]) fusion(%w), kind=kCustom, calls=%start",
        "%loop = (s32[], bf16[64,512]) while(%t), condition=%condition, body=%body",
        "%ad = bf16[1024,512]{1,0} fusion(%as), kind=kCustom, calls=%end",
        others=others,
    )
    assert read_collectives(text) == [
        Collective("all-gather", 1024 * 512 * 2, 16, 1, True, "jit(step)/head"),
        Collective("reduce-scatter", 2048 * 512 * 4, 16, 24, False, ""),
    ]


def test_kernels_are_counted_as_often_as_they_run() -> None:
    call = '{} = bf16[2,64]{{1,0}} custom-call(%q), custom_call_target="{}", backend_config={{}}'
    loop = 'while(%t), condition=%none, body=%body, backend_config={"known_trip_count":{"n":"24"}}'
    text = program(
        call.format("%gla_forward.2", "tpu_custom_call"),
        f"%loop = (s32[]) {loop}",
        call.format("%buffer", "AllocateBuffer"),
        others="\n".join(
            ["%body (t: (s32[])) -> (s32[]) {", "  " + call.format("%gla_forward", "tpu_custom_call"), "}"]
        ),
    )
    assert read_kernels(text) == {"gla_forward": 25}


def test_memory_is_what_the_arrays_take(mesh: jax.sharding.Mesh) -> None:
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=NamedSharding(mesh, P("a", "b")))
    part = 1024 * 1024 * 4 // 8
    memory = read_memory(jax.jit(lambda x: x + 1).lower(x).compile())
    assert (memory.arguments, memory.temporary) == (part, part)
    assert memory.peak == memory.arguments + memory.temporary + memory.code
    donated = read_memory(jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile())
    assert (donated.arguments, donated.temporary) == (part, 0)
