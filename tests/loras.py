"""Random adapters of the tiny model, and the model with one in its weights."""

import copy

import torch

# Of each block: what is in both streams, what goes in and out of attention and MLPs, modulations.
LAYERS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2", "img_mod.1", "txt_mod.1"),
)
OUTSIDE = ("img_in", "time_text_embed.timestep_embedder.linear_1", "norm_out.linear", "proj_out")


def make_lora(stock, layers=LAYERS, outside=OUTSIDE, rank=3, seed=0, size=0.15):
    """The factors of an adapter, by the names that a file has."""
    generator, state = torch.Generator().manual_seed(seed), {}
    paths = [f"transformer_blocks.{n}.{layer}" for n in range(len(stock.transformer_blocks)) for layer in layers]
    for path in (*paths, *outside):
        rows, columns = stock.get_submodule(path).weight.shape
        state[f"transformer.{path}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * size
        state[f"transformer.{path}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * size
    return state


def merged(model, state, scale=1.0):
    """A stock model with an adapter added to its weights."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, down in state.items():
            if name.endswith("lora_A.weight"):
                path = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
                model.get_submodule(path).weight += scale * state[name.replace("lora_A", "lora_B")] @ down
    return model
