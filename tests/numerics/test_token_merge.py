"""Token merging: the kernels and the torch reference against float64 and against bipartite soft matching as it was published."""

import itertools

import pytest
import torch

from mmscale.kernels.token_merge import MergePlan, merge, plan_merges, unmerge

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODES = ["torch", "triton"]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
LENGTHS = [[16, 33, 7, 1, 50], [40, 33], [1], [2, 1, 2], [67]]
MERGES = [[4, 10, 99, 3, 0], [15, 16], [5], [1, 1, 0], [33]]
CASES = list(zip(LENGTHS, MERGES, strict=True))


@pytest.fixture(params=MODES)
def mode(request, monkeypatch):
    monkeypatch.setenv("MMSCALE_KERNELS", request.param)
    return request.param


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def borders(lengths):
    return int32([0, *torch.tensor(lengths).cumsum(0).tolist()])


def rows_left(lengths, merges):
    return sum(n - min(max(r, 0), n // 2) for n, r in zip(lengths, merges, strict=True))


def plan_of(metric, lengths, merges):
    return plan_merges(metric, borders(lengths), int32(merges), max(lengths, default=0), rows_left(lengths, merges))


def sets(plan):
    """The inputs of each output row, in the order of the plan."""
    ptr, inputs = plan.ptr.tolist(), plan.inputs.tolist()
    return [tuple(inputs[a:b]) for a, b in itertools.pairwise(ptr)]


def error(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def published(metric_NC, r):
    """Bolya et al. 2023, section 3 and appendix D, on one image in float64: the merged sets of tokens.

    Alternate tokens go to A and B; one edge from every token in A to its most similar one in B; the r most similar edges
    stay; what they connect is merged.
    """
    if len(metric_NC) == 1:
        return {(0,)}
    metric = metric_NC.double()
    metric = metric / metric.norm(dim=-1, keepdim=True)
    a, b = metric[0::2], metric[1::2]
    r = min(r, len(metric) // 2)
    weight, target = (a @ b.T).max(dim=-1)
    edge = weight.argsort(descending=True)
    groups = {2 * d + 1: [2 * d + 1] for d in range(len(b))}
    for source in edge[:r].tolist():
        groups[2 * int(target[source]) + 1].append(2 * source)
    groups |= {2 * source: [2 * source] for source in edge[r:].tolist()}
    return {tuple(sorted(g)) for g in groups.values()}


@pytest.mark.parametrize(("n", "r"), [(16, 4), (49, 20), (50, 25), (33, 99), (9, 0), (2, 1)])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_equals_the_published_algorithm(mode, n, r, is_weighted, seed):
    torch.manual_seed(seed)
    x = torch.randn(n, 24, device=DEVICE)
    sizes = torch.randint(1, 5, (n,), device=DEVICE).float() if is_weighted else None
    plan = plan_of(x, [n], [r])
    expected = published(x, r)
    assert {*sets(plan)} == expected and len(sets(plan)) == len(expected)
    rows, totals = merge(x, plan, sizes)
    weight = torch.ones(n, device=DEVICE) if sizes is None else sizes
    for o, members in enumerate(sets(plan)):
        w = weight[list(members)].double()
        mean = (w[:, None] * x[list(members)].double()).sum(0) / w.sum()
        assert error(rows[o], mean) < 1e-6
        assert totals[o] == w.sum()


@pytest.mark.parametrize(("lengths", "merges"), CASES)
def test_a_plan_is_consistent_and_keeps_the_order(mode, lengths, merges, seed):
    torch.manual_seed(seed)
    x = torch.randn(sum(lengths), 20, device=DEVICE)
    plan = plan_of(x, lengths, merges)
    assert all(t.dtype == torch.int32 for t in plan)
    left = [n - min(r, n // 2) for n, r in zip(lengths, merges, strict=True)]
    assert plan.cu_seqlens.tolist() == borders(left).tolist()
    cu = borders(lengths).tolist()
    groups = sets(plan)
    assert sorted(t for g in groups for t in g) == list(range(sum(lengths)))
    assert plan.slot.tolist() == [o for _, o in sorted((t, o) for o, g in enumerate(groups) for t in g)]
    for s, (first, last) in enumerate(itertools.pairwise(cu)):
        own = groups[plan.cu_seqlens[s] : plan.cu_seqlens[s + 1]]
        assert all(first <= t < last and list(g) == sorted(g) for g in own for t in g)
        assert {*own} == {tuple(first + t for t in g) for g in published(x[first:last], merges[s])}
        # a row stands where its target stood, or its only token
        kept = [next((t for t in g if (t - first) % 2), g[0]) for g in own]
        assert kept == sorted(kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 72, 100])
def test_the_kernel_plans_like_the_reference(dtype, width, seed, monkeypatch):
    torch.manual_seed(seed)
    lengths = [70, 1, 37, 2, 131]
    merges = [20, 1, 18, 0, 70]
    # small integers: sums are exact, so that scores are equal where they are equal in exact arithmetic: many ties
    ties = torch.randint(-1, 2, (sum(lengths), width), device=DEVICE)
    ties[::5] = ties[1::5][: len(ties[::5])].repeat(2, 1)[: len(ties[::5])]
    for metric in (torch.randn(sum(lengths), width, device=DEVICE).to(dtype), ties.to(dtype)):
        plans = []
        for mode in MODES:
            monkeypatch.setenv("MMSCALE_KERNELS", mode)
            plans.append(plan_of(metric, lengths, merges))
        assert all(torch.equal(a, b) for a, b in zip(*plans, strict=True))


def test_equal_scores_go_to_the_lower_index(mode):
    one, other = [1.0, 0.0, 0.0, 2.0], [0.0, 3.0, 0.0, 0.0]
    # sources 0, 2, 4 and 6 are all like targets 1 and 5
    x = torch.tensor([one, one, one, other, one, one, one, other], device=DEVICE)
    for r, expected in (
        (0, {}),
        (1, {1: (0, 1)}),
        (2, {1: (0, 1, 2)}),
        (3, {1: (0, 1, 2, 4)}),
        (4, {1: (0, 1, 2, 4, 6)}),
    ):
        groups = {g[0] if len(g) == 1 else next(t for t in g if t % 2): g for g in sets(plan_of(x, [8], [r]))}
        assert {k: g for k, g in groups.items() if len(g) > 1} == expected


def test_rows_of_zeros_and_of_nan_have_a_place(mode):
    x = torch.randn(12, 16, device=DEVICE)
    x[2:8] = 0.0
    assert len(sets(plan_of(x, [12], [6]))) == 6
    x[4] = float("nan")
    x[9] = float("inf")
    for r in (3, 6):
        plan = plan_of(x, [12], [r])
        assert sorted(plan.inputs.tolist()) == list(range(12))
        assert int(plan.slot.min()) == 0 and int(plan.slot.max()) == 11 - r
    zeros = plan_of(torch.zeros(7, 8, device=DEVICE), [7], [2])
    assert sets(zeros) == [(0, 1, 2), (3,), (4,), (5,), (6,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "is_weighted"), [(24, True), (100, False), (1152, True)])
def test_merge_and_unmerge_equal_float64(mode, dtype, width, is_weighted, seed):
    torch.manual_seed(seed)
    lengths, merges = ([9, 1, 14], [3, 1, 7]) if width > 1000 else ([33, 1, 18, 7], [12, 1, 9, 0])
    n = sum(lengths)
    x = torch.randn(n, width, device=DEVICE).to(dtype).requires_grad_()
    sizes = torch.rand(n, device=DEVICE) * 7 + 0.5 if is_weighted else None
    plan = plan_of(x, lengths, merges)
    rows, totals = merge(x, plan, sizes)
    assert rows.dtype == dtype and not totals.requires_grad
    matrix = torch.zeros(len(rows), n, dtype=torch.float64, device=DEVICE)
    matrix[plan.slot.long(), torch.arange(n, device=DEVICE)] = 1.0 if sizes is None else sizes.double()
    assert error(totals, matrix.sum(1)) < 1e-6
    mean = matrix / matrix.sum(1, keepdim=True)
    grad = torch.randn_like(rows)
    rows.backward(grad)
    assert error(rows.detach(), mean @ x.detach().double()) < TOLERANCE[dtype]
    assert error(x.grad, mean.T @ grad.double()) < TOLERANCE[dtype]
    y = rows.detach().clone().requires_grad_()
    back = unmerge(y, plan)
    grad = torch.randn_like(back)
    back.backward(grad)
    taken = (matrix > 0).double()
    assert torch.equal(back.detach().double(), taken.T @ y.detach().double())
    assert error(y.grad, taken @ grad.double()) < TOLERANCE[dtype]


def test_the_reference_is_exact_in_float64(seed):
    torch.manual_seed(seed)
    x = torch.randn(19, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    sizes = torch.rand(19, dtype=torch.float64, device=DEVICE) + 0.1
    plan = plan_of(x, [7, 12], [2, 6])
    assert torch.autograd.gradcheck(lambda v: merge(v, plan, sizes)[0], (x,))
    rows = torch.randn(11, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: unmerge(v, plan), (rows,))


def test_rounds_compose(mode, seed):
    """Two rounds with sizes give plain means of the original tokens."""
    torch.manual_seed(seed)
    lengths = [24, 11]
    x = torch.randn(35, 16, device=DEVICE)
    first = plan_of(x, lengths, [12, 4])
    rows, sizes = merge(x, first)
    second = plan_merges(rows, first.cu_seqlens, int32([5, 3]), 12, 35 - 16 - 8)
    rows, sizes = merge(rows, second, sizes)
    to = second.slot.long()[first.slot.long()]
    for o in range(len(rows)):
        assert error(rows[o], x[to == o].double().mean(0)) < 1e-6
        assert sizes[o] == int((to == o).sum())
    assert torch.equal(unmerge(unmerge(rows, second), first), rows[to])


def test_ten_runs_are_equal_to_the_bit(mode, seed):
    torch.manual_seed(seed)
    x = torch.randn(60, 40, device=DEVICE).bfloat16().requires_grad_()
    sizes = torch.rand(60, device=DEVICE) + 1
    grad = torch.randn(60 - 25 - 5, 40, device=DEVICE).bfloat16()
    runs = []
    for _ in range(10):
        x.grad = None
        plan = plan_of(x, [50, 10], [25, 9])
        rows, totals = merge(x, plan, sizes)
        rows.backward(grad)
        runs.append([*plan, rows.detach(), totals, x.grad])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_no_rows_and_no_segments(mode):
    x = torch.zeros(0, 8, device=DEVICE, requires_grad=True)
    plan = plan_merges(x, int32([0]), int32([]), 0, 0)
    rows, totals = merge(x, plan)
    assert plan.ptr.tolist() == [0] and rows.shape == (0, 8) and totals.shape == (0,)
    unmerge(rows, plan).sum().backward()
    assert x.grad.shape == (0, 8)


def test_every_output_is_written(seed, monkeypatch):
    """What the kernels allocate is filled with NaN and large numbers first."""
    torch.manual_seed(seed)
    monkeypatch.setenv("MMSCALE_KERNELS", "triton")
    x = torch.randn(63, 24, device=DEVICE, requires_grad=True)

    def run():
        x.grad = None
        plan = plan_of(x, [40, 1, 22], [9, 1, 11])
        rows, totals = merge(x, plan)
        unmerge(rows, plan).square().sum().backward()
        return [*plan, rows.detach(), totals, x.grad]

    clean, new_empty = run(), torch.Tensor.new_empty

    def poisoned(self, *size, **options):
        out = new_empty(self, *size, **options)
        return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(1_000_000_007)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    assert all(torch.equal(a, b) for a, b in zip(clean, run(), strict=True))


def test_views_are_taken_as_they_are(mode, seed):
    torch.manual_seed(seed)
    wide = torch.randn(30, 3, 16, device=DEVICE)
    x = wide[:, 1].requires_grad_()
    plan, same = plan_of(x, [30], [12]), plan_of(x.contiguous(), [30], [12])
    assert all(torch.equal(a, b) for a, b in zip(plan, same, strict=True))
    rows, _ = merge(x, plan)
    assert torch.equal(rows, merge(x.contiguous(), plan)[0])
    rows.sum().backward()  # an expanded gradient
    assert torch.allclose(x.grad.sum(0), torch.full((16,), 18.0, device=DEVICE))


def test_frozen_rows_want_no_gradient(mode):
    x = torch.randn(10, 8, device=DEVICE)
    rows, totals = merge(x, plan_of(x, [10], [4]))
    assert not rows.requires_grad and not totals.requires_grad


def test_second_derivatives_of_the_kernels_are_refused(seed, monkeypatch):
    torch.manual_seed(seed)
    monkeypatch.setenv("MMSCALE_KERNELS", "triton")
    x = torch.randn(10, 8, device=DEVICE, requires_grad=True)
    plan = plan_of(x, [10], [4])
    for rows in (merge(x, plan)[0], unmerge(x[:6], plan)):
        (grad,) = torch.autograd.grad(rows.square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="first derivatives only"):
            grad.sum().backward()


def test_autocast_changes_nothing(mode, seed):
    torch.manual_seed(seed)
    x = torch.randn(64, 32, device=DEVICE)
    plan = plan_of(x, [64], [20])
    rows, _ = merge(x, plan)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        again = plan_of(x, [64], [20])
        assert all(torch.equal(a, b) for a, b in zip(plan, again, strict=True))
        assert torch.equal(merge(x, plan)[0], rows)


@pytest.mark.parametrize("max_len_and_out", [(9, 14), (10, 13), (10, 15)])
def test_wrong_numbers_of_the_host_are_refused(mode, max_len_and_out):
    if DEVICE == "cuda":
        pytest.skip("a failed assertion of the device ends its process")
    with pytest.raises(RuntimeError, match="num_out = T"):
        plan_merges(torch.randn(18, 4), borders([8, 10]), int32([1, 3]), *max_len_and_out)


def test_wrong_shapes_and_types_are_refused():
    x, cu = torch.randn(6, 4, device=DEVICE), borders([6])
    for metric, borders_, merges in ((x[0], cu, int32([1])), (x, cu.long(), int32([1])), (x, cu, int32([1, 2]))):
        with pytest.raises(ValueError, match="int32 cu_seqlens"):
            plan_merges(metric, borders_, merges, 6, 5)
    plan = plan_of(x, [6], [1])
    with pytest.raises(ValueError, match="6 rows are expected"):
        merge(x[1:], plan)
    with pytest.raises(ValueError, match="without gradient"):
        merge(x, plan, torch.ones(6, device=DEVICE, requires_grad=True))
    with pytest.raises(ValueError, match="5 rows are expected"):
        unmerge(x, plan)


def test_long_segments_are_matched_in_chunks(seed, monkeypatch):
    torch.manual_seed(seed)
    monkeypatch.setenv("MMSCALE_KERNELS", "torch")
    x = torch.randn(300, 8, dtype=torch.float64, device=DEVICE)
    whole = plan_of(x, [100, 200], [30, 77])
    monkeypatch.setattr("mmscale.kernels.token_merge._SCORES", 1000)
    assert all(torch.equal(a, b) for a, b in zip(whole, plan_of(x, [100, 200], [30, 77]), strict=True))


def test_operators_are_registered_soundly(seed):
    torch.manual_seed(seed)
    x = torch.randn(14, 8, device=DEVICE, requires_grad=True)
    cu, r, sizes = borders([9, 5]), int32([3, 2]), torch.rand(14, device=DEVICE) + 1
    slot, ptr, inputs, _ = torch.ops.mmscale.plan_merges(x.detach(), cu, r, 9, 9)
    check = torch.library.opcheck
    check(torch.ops.mmscale.plan_merges, (x.detach(), cu, r, 9, 9))
    check(torch.ops.mmscale.merge_rows, (x, sizes, slot, ptr, inputs))
    check(torch.ops.mmscale.merge_rows, (x, None, slot, ptr, inputs))
    check(torch.ops.mmscale.unmerge_rows, (x[:9], slot, ptr, inputs))


def test_compiles_without_graph_breaks(mode, seed):
    torch.manual_seed(seed)
    x = torch.randn(40, 16, device=DEVICE)
    cu, r = borders([20, 20]), int32([7, 7])

    def both(x):
        plan = plan_merges(x, cu, r, 20, 26)
        rows, sizes = merge(x, plan)
        assert isinstance(plan, MergePlan)
        return unmerge(rows * sizes[:, None], plan)

    torch._dynamo.reset()  # what was compiled for the other mode
    results = []
    for function in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
