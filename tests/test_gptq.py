"""gptq: against the plain algorithm, a hand-worked example, round-to-nearest, and bad input."""

import pytest
import torch

from quantlab import Hessian, PerAxis, PerGroup, gptq_quantize, plain, quantize_tensor
from quantlab.gptq import factorize, gptq_steps, obq_steps


def layer(rows=48, columns=200, tokens=1500, seed=0):
    """A weight and correlated inputs with a few loud channels, as a language model has them."""
    random = torch.Generator().manual_seed(seed)
    basis = torch.randn(columns, columns, generator=random) / columns**0.5
    x = (torch.randn(tokens, columns, generator=random) * torch.arange(1, columns + 1) ** -0.5 * 3) @ basis
    x += 0.1 * torch.randn(tokens, columns, generator=random)
    x[:, 3] *= 10
    return torch.randn(rows, columns, generator=random) * 0.05, x


@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
@pytest.mark.parametrize("group_size", [None, 128, 48, 32, 7, 256])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_equal_the_plain_algorithm(bits, group_size, act_order):
    weight, x = layer()
    weight, hessian = weight.double(), Hessian(200).add(x)
    how = {"bits": bits, "group_size": group_size, "act_order": act_order}
    q = gptq_quantize(weight, hessian, **how)
    codes, _, _, values = plain.gptq(weight, hessian.matrix, **how)
    assert torch.equal(q.codes.double(), codes)
    torch.testing.assert_close(q.dequantize(), values, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("act_order", [False, True], ids=["in-order", "act-order"])
def test_symmetric_codes_equal_the_plain_algorithm(act_order):
    """Per row only: a symmetric grid puts its largest weight on an exact tie (±7.5 steps), and in an *updated*
    group the last digit of a float64 decides it, differently in any two ways of summing."""
    weight, x = layer()
    weight, hessian = weight.double(), Hessian(200).add(x)
    q = gptq_quantize(weight, hessian, bits=4, symmetric=True, act_order=act_order)
    codes, _, _, _ = plain.gptq(weight, hessian.matrix, bits=4, symmetric=True, act_order=act_order)
    assert torch.equal(q.codes.double(), codes)


def test_float32_weights_give_nearly_the_same_codes():
    weight, x = layer(rows=256, columns=256)
    hessian = Hessian(256).add(x)
    codes, _, _, _ = plain.gptq(weight.double(), hessian.matrix, bits=4, group_size=128)
    same = gptq_quantize(weight, hessian, bits=4, group_size=128).codes == codes
    assert same.double().mean() >= 0.999


def test_two_rows_of_three_by_hand():
    """H = [[4, 2, 0], [2, 2, 0], [0, 0, 1]], so H⁻¹ = [[½, -½, 0], [-½, 1, 0], [0, 0, 1]] and its upper Cholesky factor
    has first row (√½, -√½, 0): an error e of column 1 moves column 2 by + e, and column 3 not at all."""
    x = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.5**0.5]]) * 3**0.5
    hessian = Hessian(3).add(x)
    torch.testing.assert_close(hessian.matrix, torch.tensor([[4.0, 2, 0], [2, 2, 0], [0, 0, 1]], dtype=torch.float64))
    weight = torch.tensor([[0.4, 0.4, 3.0], [1.3, 1.4, 3.0]])
    q = gptq_quantize(weight, hessian, bits=2, damping=0.0)  # grid 0, 1, 2, 3 for both rows
    nearest = quantize_tensor(weight, bits=2, granularity=PerAxis(0), symmetric=False)
    # row 1: 0.4 -> 0, error 0.4, so the second becomes 0.8 -> 1; row 2: 1.3 -> 1, error 0.3, second 1.7 -> 2
    assert q.dequantize().tolist() == [[0, 1, 3], [1, 2, 3]]
    assert nearest.dequantize().tolist() == [[0, 0, 3], [1, 1, 3]]
    assert hessian.output_error(weight, q.dequantize()) < hessian.output_error(weight, nearest.dequantize())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("symmetric", [False, True])
def test_output_error_below_round_to_nearest(seed, group_size, symmetric):
    weight, x = layer(seed=seed)
    hessian = Hessian(200).add(x)
    granularity = PerAxis(0) if group_size is None else PerGroup(group_size)
    for bits in (2, 3, 4):
        nearest = quantize_tensor(weight, bits=bits, granularity=granularity, symmetric=symmetric).dequantize()
        for act_order in (False, True):
            q = gptq_quantize(
                weight, hessian, bits=bits, group_size=group_size, symmetric=symmetric, act_order=act_order
            )
            error = [((w - weight) @ x.T).square().sum().item() for w in (q.dequantize(), nearest)]
            assert error[0] < 0.8 * error[1]
            assert (q.dequantize() - weight).square().sum() > (nearest - weight).square().sum()  # the paradox


def test_uncorrelated_inputs_leave_round_to_nearest():
    weight, _ = layer()
    q = gptq_quantize(weight, Hessian(200).add(torch.eye(200)), bits=4)
    assert torch.equal(q.codes, quantize_tensor(weight, bits=4, granularity=PerAxis(0), symmetric=False).codes)


def test_output_error_is_that_of_the_layer():
    weight, x = layer()
    other = weight + 0.01
    expected = ((x @ (weight - other).T).square().sum() / (x @ weight.T).square().sum()).item()
    assert Hessian(200).add(x).output_error(weight, other) == pytest.approx(expected, rel=1e-4)


def test_hessian_adds_up_batches_of_any_shape():
    _, x = layer()
    parts = Hessian(200).add(x[:500]).add(x[500:].reshape(2, 500, 200))
    torch.testing.assert_close(parts.matrix, Hessian(200).add(x).matrix, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts.matrix, 2 / 1500 * (x.double().T @ x.double()), rtol=1e-4, atol=1e-4)
    assert parts.tokens == 1500


def test_sharing_a_hessian_equals_stacking_rows():
    weight, x = layer()
    hessian = Hessian(200).add(x)
    whole = gptq_quantize(weight, hessian, bits=4, group_size=32)
    halves = [gptq_quantize(w, hessian, bits=4, group_size=32).codes for w in weight.split(24)]
    assert torch.equal(whole.codes, torch.cat(halves))
    assert len(hessian._factors) == 1  # factorized once


def test_dead_columns_are_rounded_to_nearest_and_harm_nothing():
    weight, x = layer()
    x[:, 50:60] = 0
    for act_order in (False, True):
        q = gptq_quantize(weight.double(), Hessian(200).add(x), bits=4, act_order=act_order)
        nearest = quantize_tensor(weight, bits=4, granularity=PerAxis(0), symmetric=False)
        assert torch.equal(q.codes[:, 50:60], nearest.codes[:, 50:60])
        codes, *_ = plain.gptq(weight, Hessian(200).add(x).matrix, bits=4, act_order=act_order)
        assert torch.equal(q.codes.double(), codes)


def test_damping_rises_when_it_must():
    weight, x = layer(tokens=50)  # fewer tokens than columns: singular
    with pytest.warns(UserWarning, match="not positive definite with damping 0; trying 0.01"):
        q = gptq_quantize(weight, Hessian(200).add(x[:50]), bits=4, damping=0.0)
    assert torch.isfinite(q.dequantize()).all()
    with pytest.warns(UserWarning, match="not positive definite"):
        assert factorize(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), damping=0.0).damping >= 0.01


def test_factor_is_one():
    _, x = layer(columns=40)
    H = Hessian(40).add(x).matrix
    for act_order in (False, True):
        f = factorize(H, act_order=act_order, damping=0.01)
        damped = H + 0.01 * H.diagonal().mean() * torch.eye(40)
        damped = damped if f.order is None else damped[f.order][:, f.order]
        torch.testing.assert_close(f.R @ f.R.T, damped)
        assert torch.equal(f.R, f.R.triu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_comes_back_and_nothing_changes_in_place(dtype):
    weight, x = layer()
    weight = weight.to(dtype)
    before, hessian = weight.clone(), Hessian(200).add(x)
    H = hessian.matrix.clone()
    assert gptq_quantize(weight, hessian, bits=4).dequantize().dtype == dtype
    assert torch.equal(weight, before)
    assert torch.equal(hessian.matrix, H)


def test_act_order_with_groups_counts_its_index():
    weight, x = layer()
    q = gptq_quantize(weight, Hessian(200).add(x), bits=4, group_size=50, act_order=True)
    assert q.nbytes == 48 * 200 // 2 + 48 * 4 * 4 + 48 * 4 // 2 + 200 * 4
    assert sorted(q.group_index.tolist()) == sorted(list(range(4)) * 50)


def test_bad_input_names_the_rule():
    weight, x = layer()
    hessian = Hessian(200).add(x)
    with pytest.raises(ValueError, match="has seen no inputs"):
        gptq_quantize(weight, Hessian(200), bits=4)
    with pytest.raises(ValueError, match=r"need a weight \(out, 200\), got shape \(48, 100\)"):
        gptq_quantize(weight[:, :100], hessian, bits=4)
    with pytest.raises(ValueError, match="need inputs of 200 features"):
        hessian.add(x[:, :5])
    with pytest.raises(ValueError, match="bits must be 1..8"):
        gptq_quantize(weight, hessian, bits=9)
    with pytest.raises(ValueError, match="group_size must be at least 1, got 0"):
        gptq_quantize(weight, hessian, bits=4, group_size=0)
    with pytest.raises(ValueError, match="damping must be at least 0"):
        gptq_quantize(weight, hessian, bits=4, damping=-1)
    with pytest.raises(ValueError, match="finite"):
        gptq_quantize(weight * float("nan"), hessian, bits=4)
    with pytest.raises(ValueError, match="finite"):
        Hessian(200).add(x * float("inf"))
    with pytest.raises(ValueError, match="in_features must be at least 1"):
        Hessian(0)


def test_steps_end_where_gptq_ends():
    weight, x = layer()
    hessian = Hessian(200).add(x)
    states = gptq_steps(weight, hessian, bits=4)
    assert states.shape == (201, 48, 200)
    assert torch.equal(states[0], weight.double())
    torch.testing.assert_close(states[-1].float(), gptq_quantize(weight.double(), hessian, bits=4).dequantize().float())
    assert torch.equal(states[9][:, :9], states[-1][:, :9])  # a column that is done stays


# --- one row by OBQ


def obq_by_least_squares(row, x, points):
    """The definition: try each free weight on its grid point, refit the other free ones, keep the cheapest."""
    w, x, free, order = row.double().clone(), x.double(), list(range(len(row))), []
    states, goal = [w.clone()], x @ row.double()
    while free:
        tried = {}
        for i in free:
            new, others = w.clone(), [j for j in free if j != i]
            new[i] = points[(points - w[i]).abs().argmin()]
            if others:
                new[others] = 0
                new[others] = torch.linalg.lstsq(x[:, others], (goal - x @ new)[:, None]).solution[:, 0]
            tried[i] = (x @ new - goal).square().sum().item(), new
        i = min(tried, key=lambda i: tried[i][0])
        w = tried[i][1]
        free.remove(i)
        order.append(i)
        states.append(w.clone())
    return torch.stack(states), order


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("bits", [2, 3])
def test_obq_is_the_cheapest_constrained_least_squares_each_time(seed, bits):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 9, generator=random) @ torch.randn(9, 9, generator=random)
    row = torch.randn(9, generator=random)
    qp = quantize_tensor(row[None], bits=bits, granularity=PerAxis(0), symmetric=False).qparams
    points = (qp.scale * (torch.arange(qp.qmin, qp.qmax + 1) - qp.zero_point)).flatten().double()
    states, order = obq_steps(row, Hessian(9).add(x.double()), bits=bits, damping=0.0)
    wanted, wanted_order = obq_by_least_squares(row, x, points)
    assert order == wanted_order
    torch.testing.assert_close(states, wanted, rtol=1e-6, atol=1e-6)


def test_obq_takes_the_row_to_the_grid_below_round_to_nearest():
    weight, x = layer(rows=5, columns=60)
    weight, x = weight.double(), x.double()
    hessian, before, errors = Hessian(60).add(x), weight.clone(), torch.zeros(2)
    for row in weight:
        states, order = obq_steps(row, hessian, bits=3)
        nearest = quantize_tensor(row[None], bits=3, granularity=PerAxis(0), symmetric=False)
        codes = states[-1] / nearest.qparams.scale.item() + nearest.qparams.zero_point.item()
        torch.testing.assert_close(codes, codes.round().clamp(nearest.qparams.qmin, nearest.qparams.qmax))
        assert sorted(order) == list(range(60))
        for k, i in enumerate(order):
            assert (states[k + 1 :, i] == states[-1, i]).all()  # done stays done
        for k, w in enumerate((states[-1:], nearest.dequantize())):
            errors[k] += (x @ (w - row).T).square().sum()
    assert errors[0] < 0.8 * errors[1]
    assert torch.equal(weight, before)


def test_obq_of_uncorrelated_inputs_is_round_to_nearest_and_of_one_weight_too():
    weight, _ = layer(rows=1, columns=20)
    states, _ = obq_steps(weight[0], Hessian(20).add(torch.eye(20)), bits=4)
    nearest = quantize_tensor(weight, bits=4, granularity=PerAxis(0), symmetric=False).dequantize()
    torch.testing.assert_close(states[-1:].float(), nearest)
    states, order = obq_steps(torch.tensor([0.7]), Hessian(1).add(torch.ones(2, 1)), bits=2)
    assert order == [0]
    torch.testing.assert_close(states[-1].float(), torch.tensor([0.7]))


def test_obq_where_a_row_is_zero_or_an_input_silent():
    weight, x = layer(rows=1, columns=12)
    x[:, 5] = 0
    hessian = Hessian(12).add(x)
    nearest = quantize_tensor(weight, bits=3, granularity=PerAxis(0), symmetric=False).dequantize()
    assert obq_steps(weight[0], hessian, bits=3)[0][-1, 5].item() == pytest.approx(nearest[0, 5].item())
    assert obq_steps(torch.zeros(12), hessian, bits=3)[0].abs().max() == 0


def test_obq_refuses_what_is_no_row():
    weight, x = layer(rows=2, columns=12)
    hessian = Hessian(12).add(x)
    with pytest.raises(ValueError, match="one row of a weight"):
        obq_steps(weight, hessian, bits=3)
    with pytest.raises(ValueError, match="need a weight"):
        obq_steps(weight[0, :5], hessian, bits=3)
    with pytest.raises(ValueError, match="finite"):
        obq_steps(weight[0] * float("nan"), hessian, bits=3)


def test_a_hessian_of_several_blocks_is_the_product_whenever_it_is_asked_for():
    """Only one triangle is summed up, in blocks of 256 columns: read between two batches, and after them."""
    x, hessian = torch.randn(40, 600, generator=torch.Generator().manual_seed(0)), Hessian(600)
    for count in (10, 40):
        hessian.add(x[hessian.tokens : count])
        wanted = 2 / count * x[:count].double().T @ x[:count].double()
        torch.testing.assert_close(hessian.matrix, wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(hessian.matrix, hessian.matrix.T)
