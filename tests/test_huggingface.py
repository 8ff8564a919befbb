"""Small models made from transformers' configurations, measured as users have them: dict batches, default attention.

Compared with a reference in float64: the loss with the model's own, the gradient and the whole dense Hessian with those of
`torch.autograd` on the live model, and from them the sharpness, tr(H S_b) and the variance of the gradients.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import curvlab as cl

transformers = pytest.importorskip("transformers", reason="transformers is not installed", exc_type=ImportError)

N, T, V = 6, 7, 13
IDS = torch.randint(1, V, (N, T), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 5:] = MASK[4, 2:] = 0
IDS[MASK == 0] = 0
TEXT = IDS.masked_fill(MASK == 0, -100)
GAPS = TEXT.masked_fill(torch.arange(N * T).view(N, T) % 3 != 0, -100)
GAPS[3] = -100  # nothing is masked in this sequence: it weighs nothing
SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": V,
         "max_position_embeddings": T}  # fmt: skip


def gpt():
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=T, n_embd=8, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config)


CASES = {
    "gpt2": (gpt, "next_token", TEXT, 1),
    "llama": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)), "next_token", TEXT, 1),
    "bert": (lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)), "token", GAPS, 0),
    "classes": (
        lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, num_labels=3)),
        "cross_entropy", torch.arange(N) % 3, None,
    ),
}  # fmt: skip


def made(name):
    make, loss, labels, shift = CASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().double()
    return model, loss, {"input_ids": IDS, "attention_mask": MASK, "labels": labels}, shift


def dense(model, batch, shift):
    """Value, gradients of the examples and Hessian of the weighted mean, by autograd on the live model."""
    model.eval()
    params = [p for p in model.parameters() if p.requires_grad]
    with sdpa_kernel(SDPBackend.MATH):
        z, y = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"]
        if shift is None:
            losses, weights = F.cross_entropy(z, y, reduction="none"), torch.ones(N).double()
        else:
            z, y = z[:, : T - shift].mT, y[:, shift:]
            weights = (y != -100).sum(1).double()
            losses = F.cross_entropy(z, y, reduction="none").sum(1) / weights.clamp(min=1)
        scaled = losses * weights / weights.mean()
        rows = [torch.autograd.grad(x, params, retain_graph=True) for x in scaled]
        G = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(scaled.mean(), params, create_graph=True)])
        columns = torch.autograd.grad(
            gradient, params, torch.eye(len(gradient)).double(), is_grads_batched=True, allow_unused=True
        )
        H = torch.cat([c.flatten(1) for c in columns], 1)
    return scaled.mean().detach(), G, H


@pytest.mark.parametrize("split", [[6], [2, 3, 1]], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_models_of_transformers_against_dense_references(name, split):
    model, loss, batch, shift = made(name)
    parts = zip(*(tensor.split(split) for tensor in batch.values()), strict=True)
    data = (
        transformers.BatchEncoding(batch)
        if len(split) == 1
        else [dict(zip(batch, part, strict=True)) for part in parts]
    )
    model.train()  # as it is while it trains; measuring is in evaluation mode
    attention = model.config._attn_implementation
    L = cl.Objective(model, loss, data, chunk_size=4)
    assert model.training
    value, G, H = dense(model, batch, shift)
    assert float(L.value()) == pytest.approx(float(value), rel=1e-12 if name != "llama" else 1e-6)
    # its own loss; language models compute theirs in float32
    assert float(L.value()) == pytest.approx(float(model(**batch).loss.detach()), rel=1e-5)
    eps = 1e-5 if name == "llama" else 1e-12  # whose normalization and rotations are computed in float32
    torch.testing.assert_close(L.example_gradients(), G, atol=eps, rtol=1e-11)
    torch.testing.assert_close(L.gradient(), G.mean(0), atol=eps, rtol=1e-11)
    V = torch.randn(L.num_params, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(cl.hessian(L) @ V, H @ V, atol=eps, rtol=1e-10)
    names = ["sharpness", "gradient_variance", ("interaction_trace", {"target": 1e-3})]
    found = cl.measure(L, names, batch_size=2)
    assert found["sharpness"].value == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=1e-3)
    assert found["gradient_variance"].value == pytest.approx(
        float((G - G.mean(0)).square().sum(1).mean()), rel=eps * 10
    )
    g, gamma = G.mean(0), (N - 2) / (N - 1)
    trace = gamma / 2 * torch.einsum("ip,pq,iq->i", G, H, G).mean() + (1 - gamma / 2) * g @ H @ g
    low, high = found["interaction_trace"].interval(0.999)
    assert low - eps <= float(trace) <= high + eps
    assert model.config._attn_implementation == attention != "eager"


def test_the_fisher_of_a_classifier_and_its_last_layer():
    model, loss, batch, _ = made("classes")
    L = cl.Objective(model, loss, batch, parameters="classifier")
    assert L.names == ["classifier.weight", "classifier.bias"]
    found = cl.measure(L, ["fisher_trace", "ggn_trace", "hessian_trace"])
    H = cl.dense(cl.hessian(L))
    assert found["ggn_trace"].value == pytest.approx(float(H.trace()), rel=1e-10)  # linear in the last layer
    low, high = found["fisher_trace"].interval(0.999)
    assert low <= float(H.trace()) <= high


def test_a_monitor_in_a_loop_of_tokens():
    model, loss, batch, _ = made("gpt2")
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    names = ["loss", "preconditioned_sharpness", "gradient_concentration"]
    monitor = cl.Monitor(model, names, loss=loss, data=batch, optimizer=adam, batch_size=N, announce=None)
    found = []
    for _ in range(3):
        adam.zero_grad()
        model(**batch).loss.backward()
        found.append(monitor())
        adam.step()
    assert monitor.threshold == pytest.approx(38 / 1e-3)
    losses = [float(one["loss"].value) for one in found]
    assert losses == sorted(losses, reverse=True)
    assert all(one["gradient_concentration"].value == pytest.approx(1.0) for one in found)
