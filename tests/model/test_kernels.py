"""Every attention against float64 NumPy, forward and backward; and which of them runs where."""

import functools
import re
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpy_attention
import pytest
from running import python

from plasticity_jax.errors import UserError
from plasticity_jax.model import kernels
from plasticity_jax.model.attention import attend, attention_mask
from plasticity_jax.model.kernels import KERNELS, choose_kernel, kernel_attention

splash = functools.partial(kernel_attention, "splash", interpret=True)
cudnn = functools.partial(kernel_attention, "cudnn")


def xla(q, k, v, *, segment_ids_BxT):
    return attend(q, k, v, attention_mask(q.shape[1], segment_ids_BxT))[0]


def out_and_gradients(attention, q, k, v, out_gradient, segments):
    out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, segment_ids_BxT=segments), q, k, v)
    return out, *pull(out_gradient)


def assert_equals_numpy(attention, arrays, atol=2e-5):
    q, k, v, out_gradient, segments = arrays
    actual = jax.jit(functools.partial(out_and_gradients, attention))(*arrays)
    expected = numpy_attention.forward(q, k, v, segments), *numpy_attention.backward(q, k, v, out_gradient, segments)
    for name, a, e in zip(("out", "q", "k", "v"), actual, expected, strict=True):
        assert a.dtype == q.dtype
        np.testing.assert_allclose(a, e, atol=atol, rtol=1e-5, err_msg=name)


@pytest.fixture
def cudnn_by_xla(monkeypatch):
    """cuDNN's part done by XLA, so that all that lies around it runs here: lengths, masks, both passes, and members."""
    asked = []
    whole = jax.nn.dot_product_attention

    def stand_in(*arrays, implementation, **options):
        asked.append(implementation)
        return whole(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    yield
    assert asked and set(asked) == {"cudnn"}


def test_the_reference_gradient_equals_finite_differences():
    q, k, v, out_gradient, segments = numpy_attention.example(4, length=7, segmented=True)
    arrays = [x.astype(np.float64) for x in (q, k, v)]
    gradients = numpy_attention.backward(*arrays, out_gradient, segments)
    rng = np.random.default_rng(1)
    for which, gradient in enumerate(gradients):
        direction = rng.normal(size=gradient.shape)

        def along(step):
            moved = [x + step * direction if i == which else x for i, x in enumerate(arrays)]
            return np.sum(out_gradient * numpy_attention.forward(*moved, segments))

        assert (along(1e-5) - along(-1e-5)) / 2e-5 == pytest.approx(np.sum(gradient * direction), rel=1e-7)


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("head_dim", [48, 64, 128])
def test_xla_equals_float64_forward_and_backward(head_dim, segmented):
    assert_equals_numpy(xla, numpy_attention.example(head_dim, length=33, segmented=segmented))


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("head_dim", [48, 64, 128])
def test_splash_equals_float64_forward_and_backward(head_dim, segmented):
    assert_equals_numpy(splash, numpy_attention.example(head_dim, length=128, segmented=segmented, batch=1))


def test_splash_takes_lengths_that_its_blocks_do_not_divide():
    assert_equals_numpy(splash, numpy_attention.example(48, length=75, segmented=True, batch=2))


def test_splash_in_several_blocks_equals_float64(monkeypatch):
    monkeypatch.setattr(kernels, "LARGEST_BLOCK", 128)
    assert_equals_numpy(splash, numpy_attention.example(48, length=384, segmented=True, batch=1, n_heads=3, n_kv_heads=1))


def test_segments_keep_a_token_from_reading_another_segment():
    """Bit by bit: what an earlier segment holds changes nothing in a later one."""
    q, k, v, _, segments = (x if x is None else jnp.asarray(x) for x in numpy_attention.example(48, length=128, segmented=True, batch=1))
    later = np.asarray(segments[0]) == 2
    before = int(np.argmax(later))
    for attention in (xla, splash):
        read = functools.partial(attention, segment_ids_BxT=segments)
        np.testing.assert_array_equal(read(q, k, v)[0, later], read(q, k.at[:, :before].set(9.0), v.at[:, :before].set(9.0))[0, later])


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("length", [16, 21])
def test_what_lies_around_cudnn_equals_float64(cudnn_by_xla, length, segmented):
    assert_equals_numpy(cudnn, numpy_attention.example(48, length=length, segmented=segmented))


@pytest.mark.parametrize("attention", [cudnn, splash], ids=["cudnn", "splash"])
def test_members_share_a_batch(request, attention):
    """Under vmap, where queries, keys and values are of each member and the segment ids of all."""
    if attention is cudnn:
        request.getfixturevalue("cudnn_by_xla")
    members = [numpy_attention.example(16, length=17, segmented=True, seed=seed, n_heads=2, n_kv_heads=1) for seed in (0, 1, 2)]
    segments = members[0][-1]
    stacked = [np.stack(arrays) for arrays in list(zip(*members))[:4]]
    step = jax.vmap(functools.partial(out_and_gradients, attention), in_axes=(0, 0, 0, 0, None), spmd_axis_name="member")
    of_members = jax.jit(step)(*stacked, segments)
    for member, (q, k, v, out_gradient, _) in enumerate(members):
        expected = numpy_attention.forward(q, k, v, segments), *numpy_attention.backward(q, k, v, out_gradient, segments)
        for actual, wanted in zip(of_members, expected, strict=True):
            np.testing.assert_allclose(actual[member], wanted, atol=2e-5)


def test_cudnn_is_what_a_cuda_program_calls(monkeypatch):
    """The program for NVIDIA GPUs, lowered without one: forward and backward, with members, with and without segments."""
    from jax._src.cudnn import fused_attention_stablehlo  # jax asks an installed cuDNN for its version when it traces

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)
    q, out_gradient = (jax.ShapeDtypeStruct((3, 2, 16, 4, 48), jnp.bfloat16),) * 2
    k = v = jax.ShapeDtypeStruct((3, 2, 16, 2, 48), jnp.bfloat16)
    for segments, name in ((None, "fmhaSoftmax"), (jax.ShapeDtypeStruct((2, 16), jnp.int32), "fmhaScaleBiasSoftmax")):
        step = jax.vmap(functools.partial(out_and_gradients, cudnn), in_axes=(0, 0, 0, 0, None), spmd_axis_name="member")
        lowered = jax.jit(step).trace(q, k, v, out_gradient, segments).lower(lowering_platforms=("cuda",)).as_text()
        assert set(re.findall(r"__cudnn\$(\w+)", lowered)) == {name, f"{name}Backward"}
        assert "6x4x16x16" not in lowered, "scores of every head in memory"
        assert ("tensor<6x1x16x16xbf16>" in lowered) == (segments is not None), "the mask is of all members' rows, or cuDNN reads past its end"


@pytest.mark.parametrize(
    "kernel, sizes, heads",
    [
        ("splash", "member=2, data=2, tensor=2", "4, 2"),  # each shard has a key-value head of its own
        ("cudnn", "member=2, data=1, tensor=4", "8, 2"),  # two shards read one key-value head
        ("cudnn", "data=2, fsdp=2, tensor=2", "6, 2"),  # no members, though the mesh has the axis
    ],
)
def test_eight_devices_equal_float64(kernel, sizes, heads):
    code = f"""
        import functools
        import jax, numpy as np, numpy_attention
        from jax.sharding import NamedSharding, PartitionSpec as P
        from plasticity_jax.config import MeshConfig
        from plasticity_jax.model.kernels import kernel_attention
        from plasticity_jax.parallel import make_mesh

        whole = jax.nn.dot_product_attention
        jax.nn.dot_product_attention = lambda *arrays, implementation, **options: whole(*arrays, implementation="xla", **options)
        mesh, (n_heads, n_kv_heads) = make_mesh(MeshConfig({sizes})), ({heads})
        members, rows = mesh.shape["member"], ("data", "fsdp")

        def step(q, k, v, out_gradient, segments):
            attention = functools.partial(kernel_attention, "{kernel}", segment_ids_BxT=segments, mesh=mesh, interpret=True)
            out, pull = jax.vjp(attention, q, k, v)
            return out, *pull(out_gradient)

        make = functools.partial(numpy_attention.example, 16, length=20, batch=4, segmented=True, n_heads=n_heads, n_kv_heads=n_kv_heads)
        examples = [make(seed=seed) for seed in range(members)]
        segments = examples[0][-1]
        arrays = [np.stack(of_members) for of_members in list(zip(*examples))[:4]]
        if members > 1:
            run, place = jax.vmap(step, in_axes=(0, 0, 0, 0, None), spmd_axis_name="member"), P("member", rows)
        else:
            run, place, arrays = step, P(rows), [x[0] for x in arrays]
        actual = jax.jit(run)(*jax.device_put(arrays, NamedSharding(mesh, place)), jax.device_put(segments, NamedSharding(mesh, P(rows))))
        held = actual[0].addressable_shards[0].data.shape
        assert actual[0].size // np.prod(held) == 8, held
        for member, (q, k, v, out_gradient, _) in enumerate(examples):
            expected = numpy_attention.forward(q, k, v, segments), *numpy_attention.backward(q, k, v, out_gradient, segments)
            for a, e in zip(actual, expected, strict=True):
                np.testing.assert_allclose(a[member] if members > 1 else a, e, atol=2e-5)
    """
    python(textwrap.dedent(code), devices=8, PYTHONPATH=str(Path(numpy_attention.__file__).parent))


def test_every_shard_reads_the_key_value_heads_of_its_query_heads():
    for n_heads, n_kv_heads, shards in ((8, 2, 4), (12, 6, 4), (12, 4, 3), (16, 1, 16), (24, 8, 6), (24, 6, 4)):
        for shard in range(shards):
            local = n_heads // shards
            found = np.asarray(kernels._kv_heads_of_shard(n_heads, n_kv_heads, shards, jnp.int32(shard)))
            wanted = [head // (n_heads // n_kv_heads) for head in range(shard * local, (shard + 1) * local)]
            assert np.repeat(found, local // len(found)).tolist() == wanted


def choose(name, platform, head_dim=64, compute_dtype="bfloat16", seq_len=1024):
    return choose_kernel(name, platform=platform, head_dim=head_dim, compute_dtype=compute_dtype, seq_len=seq_len)


@pytest.mark.parametrize(
    "setting, kernel",
    [
        (dict(platform="cpu"), "xla"),
        (dict(platform="cpu", compute_dtype="float32"), "xla"),
        (dict(platform="gpu"), "cudnn"),
        (dict(platform="cuda", compute_dtype="float16"), "cudnn"),
        (dict(platform="gpu", head_dim=48), "cudnn"),
        (dict(platform="gpu", compute_dtype="float32"), "xla"),
        (dict(platform="gpu", head_dim=20), "xla"),
        (dict(platform="gpu", head_dim=256), "xla"),
        (dict(platform="tpu"), "splash"),
        (dict(platform="tpu", head_dim=48, compute_dtype="float32"), "splash"),
        (dict(platform="tpu", seq_len=None), "splash"),
        (dict(platform="tpu", seq_len=1000), "xla"),
        (dict(platform="tpu", head_dim=512), "xla"),
    ],
)
def test_auto_takes_the_kernel_of_the_platform_where_it_can_run(setting, kernel):
    assert choose("auto", **setting) == kernel
    assert kernel in KERNELS and choose(kernel, **setting) == kernel


@pytest.mark.parametrize(
    "name, setting, rule",
    [
        ("cudnn", dict(platform="cpu"), "cuDNN runs on NVIDIA GPUs only, and this is a CPU"),
        ("cudnn", dict(platform="tpu"), "cuDNN runs on NVIDIA GPUs only, and this is a TPU"),
        ("cudnn", dict(platform="gpu", compute_dtype="float32"), "bfloat16 and float16, and train.compute_dtype is float32"),
        ("cudnn", dict(platform="gpu", head_dim=20), "multiples of 8 up to 128 on this GPU, and the model's is 20"),
        ("splash", dict(platform="cpu"), "splash attention runs on TPUs only, and this is a CPU"),
        ("splash", dict(platform="gpu"), "splash attention runs on TPUs only, and this is a GPU"),
        ("splash", dict(platform="tpu", compute_dtype="float16"), "float32 and bfloat16, and train.compute_dtype is float16"),
        ("splash", dict(platform="tpu", head_dim=512), "head sizes up to 256, and the model's is 512"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused_in_one_line(name, setting, rule):
    with pytest.raises(UserError, match=re.escape(rule)) as caught:
        choose(name, **setting)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"train.attention={name!r}: ") and message.endswith("set train.attention to 'auto' or 'xla'.")


@pytest.mark.parametrize(
    "capability, head_dim, kernel",
    [("7.5", 64, "xla"), ("8.0", 64, "cudnn"), ("8.0", 256, "xla"), ("9.0", 256, "cudnn"), ("10.0", 256, "cudnn"), ("gfx942", 64, "xla")],
)
def test_the_gpu_itself_decides(monkeypatch, capability, head_dim, kernel):
    monkeypatch.setattr(kernels, "_compute_capability", lambda: capability)
    assert choose("auto", "gpu", head_dim) == kernel
    if kernel == "xla":
        with pytest.raises(UserError, match=capability if head_dim == 64 else "up to 128"):
            choose("cudnn", "gpu", head_dim)
