"""What a compiled program sends, against programs whose traffic is known by hand."""

from plasticity_jax.parallel.collectives import collective_bytes, largest_arrays, shape_bytes

HLO = """HloModule made_by_hand

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%condition (state: (s32[], f32[8,16])) -> pred[] {
  %state = (s32[], f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (state.1: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %state.1 = (s32[], f32[8,16]{1,0}) parameter(0)
  %x = f32[8,16]{1,0} get-tuple-element(%state.1), index=1
  %gather = (f32[8,16]{1,0}, f32[32,16]{1,0:T(8,128)}) all-gather-start(%x), replica_groups=[1,4]<=[4], dimensions={0}
  %gathered = f32[32,16]{1,0} all-gather-done(%gather)
  %scattered = f32[8,16]{1,0} reduce-scatter(%gathered), dimensions={0}, to_apply=%sum
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  ROOT %next = (s32[], f32[8,16]{1,0}) tuple(%i.1, %scattered)
}

ENTRY %main (p: (s32[], f32[8,16])) -> f32[8,16] {
  %p = (s32[], f32[8,16]{1,0}) parameter(0)
  %loop = (s32[], f32[8,16]{1,0}) while(%p), condition=%condition, body=%bodyTRIPS
  %y = f32[8,16]{1,0} get-tuple-element(%loop), index=1
  ROOT %total = f32[8,16]{1,0} all-reduce(%y), to_apply=%sum, metadata={op_name="jit(step)/total"}
}
""".replace("%bodyTRIPS", "%body{}")
FULL, SHARD = 32 * 16 * 4, 8 * 16 * 4


def with_trips(trips: str) -> str:
    return HLO.replace("%body{}", "%body" + trips)


def test_a_collective_in_a_loop_counts_as_often_as_the_loop_turns():
    stated = collective_bytes(with_trips(', backend_config={"known_trip_count":{"n":"5"}}'))
    assert stated == {"all-gather": 5 * FULL, "all-reduce": SHARD, "reduce-scatter": 5 * FULL}


def test_an_unstated_trip_count_is_read_from_the_condition():
    assert collective_bytes(with_trips(""))["all-gather"] == 3 * FULL


def test_a_loop_whose_turns_take_two_steps_turns_half_as_often():
    windowed = with_trips("").replace("s32[]", "u32[]").replace("constant(3)", "constant(8)")
    step = "  %two = u32[] constant(2)\n  %i.2 = u32[] add(%i.1, %two)\n"
    windowed = windowed.replace("  ROOT %next", step + "  ROOT %next").replace("tuple(%i.1, ", "tuple(%i.2, ")
    assert collective_bytes(windowed)["all-gather"] == 4 * FULL


def test_a_collective_that_runs_behind_several_fusions_counts_once():
    fused = "%fused.{n} (x.{n}: f32[8,16]) -> f32[32,16] {{\n  %x.{n} = f32[8,16]{{1,0}} parameter(0)\n"
    fused += "  ROOT %part.{n} = f32[32,16]{{1,0}} all-gather(%x.{n}), channel_id=7, dimensions={{0}}\n}}\n\n"
    calls = "".join(f"  %step.{n} = f32[32,16]{{1,0}} fusion(%x), kind=kOutput, calls=%fused.{n}\n" for n in range(3))
    hlo = with_trips("").replace("%body (", "".join(fused.format(n=n) for n in range(3)) + "%body (").replace("  %gather = ", calls + "  %gather = ")
    assert collective_bytes(hlo)["all-gather"] == 2 * 3 * FULL


def test_what_comes_after_a_kernel_whose_metadata_has_line_ends_counts_too():
    call = '%kernel = f32[8,16]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={\n'
    call += '"xprof_metadata":"{\\"block_q\\": 512}"\n}}, metadata={op_name="attention"}\n  '
    hlo = with_trips("")
    assert collective_bytes(hlo.replace("%gather = ", call + "%gather = ")) == collective_bytes(hlo)


def test_largest_arrays_are_sorted_and_named():
    sizes = [size for size, _ in largest_arrays(with_trips(""), 9)]
    assert sizes == sorted(sizes, reverse=True) and any("jit(step)/total" in text for _, text in largest_arrays(with_trips(""), 9))


def test_bytes_of_shapes():
    assert shape_bytes("bf16[4,3]{1,0:T(8,128)(2,1)}") == 24
    assert shape_bytes("(f32[2]{0}, pred[], s8[5]{0})") == 8 + 1 + 5
    assert shape_bytes("f8e4m3fn[7]") == 7 and shape_bytes("s4[6]") == 3
