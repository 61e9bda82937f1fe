"""The multi-codebook quantizer: nearest codes, losses, gradients and usage."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

from unitok_mllm import UniTokMultiCodebookQuantizer


K, V, D = 3, 7, 4
B, L = 2, 5


@pytest.fixture
def quantizer():
    return UniTokMultiCodebookQuantizer(K, V, K * D)


@pytest.fixture
def features():
    return torch.randn(B, L, K * D)


def unit_chunk(features, k):
    """(B, L, D): the k-th chunk, of unit length."""
    return F.normalize(features[..., k * D : (k + 1) * D], dim=-1)


def unit_codebook(quantizer, k):
    return F.normalize(quantizer.codebooks[k], dim=-1)


def naive_codes(quantizer, features):
    """The nearest code of each chunk by Euclidean distance, one position and sub-codebook at a time."""
    codes = torch.empty(B, K, L, dtype=torch.long)
    for b in range(B):
        for k in range(K):
            for position in range(L):
                distances = (unit_codebook(quantizer, k) - unit_chunk(features, k)[b, position]).norm(dim=-1)
                codes[b, k, position] = distances.argmin()
    return codes


def test_codes_and_vectors_agree_with_a_loop_over_codebooks(quantizer, features):
    codes = naive_codes(quantizer, features)
    output = quantizer(features)
    assert torch.equal(quantizer.encode(features), codes) and torch.equal(output.codes, codes)
    expected = torch.cat([unit_codebook(quantizer, k)[codes[:, k]] for k in range(K)], dim=-1)
    torch.testing.assert_close(quantizer.decode(codes), expected)
    torch.testing.assert_close(output.features, expected)


def test_encode_gives_back_decoded_codes(quantizer):
    codes = torch.randint(V, (B, K, L))
    assert torch.equal(quantizer.encode(quantizer.decode(codes)), codes)
    assert torch.equal(quantizer.decode(codes.to(torch.uint16)), quantizer.decode(codes))


def test_gradient_passes_straight_through_to_the_unit_chunks(quantizer, features):
    weight = torch.randn_like(features)
    features.requires_grad_()
    (through,) = torch.autograd.grad((quantizer(features).features * weight).sum(), features)
    chunks = torch.cat([unit_chunk(features, k) for k in range(K)], dim=-1)
    (direct,) = torch.autograd.grad((chunks * weight).sum(), features)
    torch.testing.assert_close(through, direct)


def test_every_sub_codebook_is_trained_by_the_vq_loss_and_by_nothing_else(quantizer, features):
    output = quantizer(features.requires_grad_())
    (gradient,) = torch.autograd.grad(output.features.sum(), quantizer.codebooks, retain_graph=True, allow_unused=True)
    assert gradient is None
    output.vq_loss.backward()
    row_norms = quantizer.codebooks.grad.norm(dim=-1)
    chosen = torch.zeros(K, V, dtype=torch.bool).scatter_(1, output.codes.transpose(0, 1).flatten(1), True)
    assert torch.equal(row_norms > 0, chosen) and chosen.any(dim=1).all()


@pytest.mark.parametrize("beta", [0.25, 2.0])
def test_vq_loss_equals_its_formula(features, beta):
    quantizer = UniTokMultiCodebookQuantizer(K, V, K * D, beta=beta)
    codes = quantizer.encode(features)
    expected = sum(
        (1 + beta) * (unit_codebook(quantizer, k)[codes[:, k]] - unit_chunk(features, k)).square().mean()
        for k in range(K)
    )
    torch.testing.assert_close(quantizer(features).vq_loss, expected / K)


@pytest.mark.parametrize("temperature", [0.01, 0.5])
def test_entropy_loss_equals_its_formula(features, temperature):
    quantizer = UniTokMultiCodebookQuantizer(K, V, K * D, entropy_temperature=temperature)
    expected = 0.0
    for k in range(K):
        chunks = unit_chunk(features, k).flatten(0, 1).double()
        distances = torch.cdist(chunks, unit_codebook(quantizer, k).double()).square()
        probs = (-distances / temperature).softmax(dim=-1)
        token_entropy = torch.special.entr(probs).sum(dim=-1).mean()
        expected += (token_entropy - torch.special.entr(probs.mean(dim=0)).sum()) / K
    output = quantizer(features, with_entropy=True)
    torch.testing.assert_close(output.entropy_loss.double(), expected, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(output.entropy_loss, quantizer.codebooks)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    assert quantizer(features).entropy_loss is None


def test_usage_is_a_moving_average_of_how_often_codes_are_chosen(quantizer):
    first, second = torch.randn(2, B, L, K * D)
    shares = []
    for features in (first, second):
        codes = naive_codes(quantizer, features)
        shares.append(torch.stack([codes[:, k].flatten().bincount(minlength=V) / (B * L) for k in range(K)]))
    quantizer.train()(first)
    torch.testing.assert_close(quantizer.usage, 0.01 * shares[0])
    assert quantizer.codebook_usage == 100 * (shares[0] > 0).float().mean()
    quantizer(second)
    torch.testing.assert_close(quantizer.usage, 0.0099 * shares[0] + 0.01 * shares[1])


def test_the_first_batch_counts_no_more_than_any_other():
    quantizer = UniTokMultiCodebookQuantizer(1, 4, D).train()
    for code in [0, *[1] * 120]:
        quantizer(quantizer.decode(torch.full((1, 1, 3), code)))
    share = quantizer.usage / quantizer.usage.sum()
    weights = 0.99 ** torch.arange(120, -1, -1.0)  # of each batch, Adam's average
    torch.testing.assert_close(share[0, :2], torch.stack([weights[0], weights[1:].sum()]) / weights.sum())
    assert quantizer.codebook_usage == 50  # 0.43% of the tokens are more than 1% of an even share
    for _ in range(80):
        quantizer(quantizer.decode(torch.ones(1, 1, 3, dtype=torch.long)))
    assert quantizer.codebook_usage == 25


def test_usage_of_older_checkpoints_which_adds_up_to_1_stays_what_it_was(quantizer, features):
    share = torch.rand(K, V).softmax(dim=1)
    quantizer.load_state_dict({"codebooks": quantizer.codebooks, "usage": share})
    quantizer.train()(features)
    torch.testing.assert_close(quantizer.usage.sum(dim=1), torch.ones(K))


@pytest.mark.parametrize("state", ["eval", "frozen", "untracked"])
def test_usage_stands_still_in_eval_mode_and_with_frozen_codebooks(quantizer, features, state):
    quantizer.train()(features)
    before = quantizer.usage.clone()
    quantizer.train(state != "eval").requires_grad_(state != "frozen")
    quantizer(torch.randn(B, L, K * D), with_entropy=True, track_usage=state != "untracked")
    assert torch.equal(quantizer.usage, before)


def test_usage_of_a_bfloat16_model_counts_beyond_what_bfloat16_can(quantizer):
    codes = torch.zeros(1, K, 1200, dtype=torch.long)
    codes[:, :, 1000:] = 1
    features = quantizer.decode(codes)
    quantizer.bfloat16().train()(features)
    torch.testing.assert_close(
        100 * quantizer.usage[:, :2].float(), torch.tensor([[1000 / 1200, 200 / 1200]] * K), rtol=0.01, atol=0
    )


def usage_and_entropy(codebooks, features):
    """The usage, the entropy loss, and its gradients at the codebooks and at the features, of one process."""
    quantizer = UniTokMultiCodebookQuantizer(K, V, K * D, entropy_temperature=0.5).train()
    with torch.no_grad():
        quantizer.codebooks.copy_(torch.from_numpy(codebooks))
    features = torch.from_numpy(features).requires_grad_()
    loss = quantizer(features, with_entropy=True).entropy_loss
    gradients = torch.autograd.grad(loss, (quantizer.codebooks, features))
    return [quantizer.usage, loss.detach(), *gradients]


def one_of_two(rank, port, codebooks, features, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(features))
    queue.put((rank, [tensor.numpy() for tensor in usage_and_entropy(codebooks, features[rank])]))
    dist.destroy_process_group()


def test_usage_and_entropy_of_two_processes_are_those_of_one_with_the_whole_batch(quantizer):
    features = torch.randn(2, 3, L, K * D)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("fork")  # a spawned process would import everything anew
    queue = context.SimpleQueue()
    codebooks = quantizer.codebooks.detach().numpy()
    arguments = (port, codebooks, features.numpy(), queue)
    processes = mp.start_processes(one_of_two, arguments, nprocs=2, join=False, start_method="fork")
    results = [[torch.from_numpy(array) for array in arrays] for _, arrays in sorted(queue.get() for _ in range(2))]
    while not processes.join():
        pass
    usage, loss, at_codebooks, at_features = usage_and_entropy(codebooks, features.flatten(0, 1).numpy())
    torch.testing.assert_close(usage.sum(), torch.tensor(0.01 * K))
    for result in results:
        torch.testing.assert_close(result[0], usage)
    of_two, codebooks_of_two = ((a + b) / 2 for a, b in zip(results[0][1:3], results[1][1:3]))
    torch.testing.assert_close(of_two, loss)
    torch.testing.assert_close(codebooks_of_two, at_codebooks)  # what DistributedDataParallel makes of them
    torch.testing.assert_close(torch.cat([result[3] for result in results]) / 2, at_features)
    assert at_codebooks.abs().max() > 1e-3 and at_features.abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_give_the_codes_of_the_same_values_in_float32(dtype):
    quantizer = UniTokMultiCodebookQuantizer(K, 512, K * D)  # many near ties, which a search in half precision loses
    features = torch.randn(8, 64, K * D).to(dtype)
    codes = quantizer.encode(features.float())
    reference = quantizer(features.float(), with_entropy=True)
    for device_dtype in (None, dtype):
        with torch.autocast("cpu", dtype=device_dtype, enabled=device_dtype is not None):
            output = quantizer(features, with_entropy=True)
            assert torch.equal(quantizer.encode(features), codes) and torch.equal(output.codes, codes)
            decoded = quantizer.decode(codes)
        assert output.features.dtype == dtype and output.vq_loss.dtype == torch.float32
        assert torch.equal(decoded, quantizer.decode(codes))
        torch.testing.assert_close(output.vq_loss, reference.vq_loss)
        torch.testing.assert_close(output.entropy_loss, reference.entropy_loss)


@pytest.mark.parametrize(
    "codes, error, message",
    [
        (torch.full((B, K, L), V), IndexError, "Codes go from 7 to 7, but each sub-codebook has codes 0 to 6"),
        (torch.full((B, K, L), -1), IndexError, "Codes go from -1 to -1"),
        (torch.zeros(B, K, L), ValueError, r"integer codes of shape \(B, 3, L\), got torch.float32 .*\(2, 3, 5\)"),
        (torch.zeros(B, L, K).long(), ValueError, r"got torch.int64 of shape \(2, 5, 3\)"),
        (torch.zeros(K, L).long(), ValueError, r"of shape \(3, 5\)"),
    ],
)
def test_impossible_codes_raise(quantizer, codes, error, message):
    with pytest.raises(error, match=message):
        quantizer.decode(codes)


def test_dims_that_do_not_split_evenly_raise():
    with pytest.raises(ValueError, match=r"dim \(10\) is not a multiple of num_codebooks \(3\)"):
        UniTokMultiCodebookQuantizer(3, V, 10)


def test_a_quantizer_made_on_the_meta_device_works_once_loaded(quantizer, features):
    quantizer.train()(features)
    with torch.device("meta"):
        other = UniTokMultiCodebookQuantizer(K, V, K * D)
    assert other.codebooks.is_meta and other.usage.is_meta
    other.load_state_dict(quantizer.state_dict(), assign=True)
    assert torch.equal(other.encode(features), quantizer.encode(features))
    assert other.codebook_usage == quantizer.codebook_usage > 0


def test_the_rotation_trick_changes_gradients_alone_and_turns_them_with_the_chunks(features):
    plain = UniTokMultiCodebookQuantizer(K, V, K * D)
    rotating = UniTokMultiCodebookQuantizer(K, V, K * D, rotation_trick=True)
    rotating.load_state_dict(plain.state_dict())
    features, weight = features.requires_grad_(), torch.randn_like(features)
    output, expected = rotating(features), plain(features)
    torch.testing.assert_close(output.features, expected.features)
    assert torch.equal(output.codes, expected.codes) and torch.equal(output.vq_loss, expected.vq_loss)

    turned_back = []
    for k in range(K):
        start = unit_chunk(features.detach(), k)
        end = unit_codebook(rotating, k)[output.codes[:, k]].detach()
        skew = end[..., :, None] * start[..., None, :] - start[..., :, None] * end[..., None, :]
        cosine = (start * end).sum(dim=-1)[..., None, None]
        rotation = torch.eye(D) + skew + skew @ skew / (1 + cosine)  # by Rodrigues' formula
        torch.testing.assert_close((rotation @ start[..., None])[..., 0], end)
        turned_back.append((rotation.mT @ weight[..., k * D : (k + 1) * D, None])[..., 0])
    chunks = torch.cat([unit_chunk(features, k) for k in range(K)], dim=-1)
    (gradient,) = torch.autograd.grad((output.features * weight).sum(), features)
    (direct,) = torch.autograd.grad((chunks * torch.cat(turned_back, dim=-1)).sum(), features)
    torch.testing.assert_close(gradient, direct)
    (straight,) = torch.autograd.grad((expected.features * weight).sum(), features)
    assert (gradient - straight).norm() > 0.1 * straight.norm()


def test_the_rotation_trick_stands_a_chunk_opposite_to_its_code():
    quantizer = UniTokMultiCodebookQuantizer(1, 1, D, rotation_trick=True)
    features = (-quantizer.codebooks[0][None]).detach().requires_grad_()
    output = quantizer(features)
    torch.testing.assert_close(output.features[0], unit_codebook(quantizer, 0).detach())
    output.features.sum().backward()
    assert features.grad.isfinite().all()
