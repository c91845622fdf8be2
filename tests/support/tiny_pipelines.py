"""Tiny random pipelines for tests: the smallest things that sample like the real ones."""

from contextlib import nullcontext
from functools import partial

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, DiffusionPipeline, DiTPipeline, DiTTransformer2DModel
from diffusers.utils import BaseOutput

from difa_compile.decision import Kind, Window


def tiny_transformer(seed=0, layers=2, sample_size=8):
    """A DiT of two heads of 8 over ``(sample_size / 2) ** 2`` tokens whose attention really matters to its output."""
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        out_channels=1,
        num_layers=layers,
        sample_size=sample_size,
        patch_size=2,
    ).eval()
    with torch.no_grad():
        for block in model.transformer_blocks:
            for projection in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
                projection.weight.mul_(3.0)
    return model


def drawn(model, seed=0):
    """``model`` for inference, parameters that start as zeros drawn anew: nothing is multiplied by 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.2, generator=generator)
    return model.eval()


def quiet(pipe):
    """``pipe`` without its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_autoencoder():
    torch.manual_seed(1)
    return AutoencoderTiny(
        in_channels=1,
        out_channels=1,
        latent_channels=1,
        encoder_block_out_channels=(2,),
        decoder_block_out_channels=(2,),
        num_encoder_blocks=(0,),
        num_decoder_blocks=(0,),
    ).eval()


def tiny_pipeline(seed=0, layers=2, sample_size=8, transformer=None, scheduler=None):
    """A ``DiTPipeline`` with DDIM; its batch is ``[cond, uncond]`` for ``guidance_scale > 1``."""
    pipe = DiTPipeline(
        transformer or tiny_transformer(seed, layers, sample_size), tiny_autoencoder(), scheduler or DDIMScheduler()
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class TwoCalls(DiffusionPipeline):
    """Guidance in two calls per step. No pipeline of diffusers: nothing but the calls says in which order."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def named(self, name):
        """What goes around the call of a branch."""
        return nullcontext()

    @torch.no_grad()
    def __call__(self, class_labels, generator=None, num_inference_steps=4, output_type="np"):
        latents = torch.randn(len(class_labels), 1, 8, 8, generator=generator)
        labels = {"cond": torch.tensor(class_labels), "uncond": torch.full((len(class_labels),), 1000)}
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.progress_bar(self.scheduler.timesteps):
            noise = {}
            for name, classes in labels.items():
                with self.named(name):
                    noise[name] = self.transformer(latents, timestep=t.expand(len(latents)), class_labels=classes)[0]
            guided = noise["uncond"] + 4 * (noise["cond"] - noise["uncond"])
            latents = self.scheduler.step(guided, t, latents).prev_sample
        return BaseOutput(images=latents.permute(0, 2, 3, 1).numpy())


class NamedCalls(TwoCalls):
    """The calls are named as in diffusers' pipelines."""

    def named(self, name):
        return self.transformer.cache_context(name)


def two_call_pipeline(cls=TwoCalls):
    """The tiny pipeline with guidance in two calls."""
    return quiet(cls(tiny_transformer(), DDIMScheduler()))


def sample(pipe, steps=4, labels=(1, 2), seed=3, **arguments):
    """Images as an array ``(len(labels), height, width, 1)``; the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    call = {"class_labels": list(labels), "num_inference_steps": steps, "generator": generator, "output_type": "np"}
    return pipe(**{**call, **arguments}).images


class PlainSites:
    """A tiny DiT whose attention is written out plainly, decision by decision: what plans are compared with.

    ``call(row, kwargs, caches)`` runs the whole model with one decision per block and returns its output and the caches
    it fills: (block, "output") unless reused, (block, "residual") of every full one.
    """

    def __init__(self, model, half, residual_window):
        self.model = model
        self.half = half
        self.residual_window = residual_window
        self.forward = model.forward
        self.attentions = [block.attn1 for block in model.transformer_blocks]

    def call(self, row, kwargs, caches, args=()):
        written = {}
        originals = [attention.forward for attention in self.attentions]
        for index, attention in enumerate(self.attentions):
            attention.forward = partial(self.attend, index, attention, row[index], caches, written)
        try:
            return self.forward(*args, **kwargs), written
        finally:
            for attention, original in zip(self.attentions, originals, strict=True):
                attention.forward = original

    def attend(self, index, attention, decision, caches, written, hidden_states, **_):
        if decision.kind is Kind.REUSE:
            return caches[index, "output"]
        batch, tokens, _ = hidden_states.shape
        shared = decision.cfg_shared
        part = slice(self.half * batch // 2, (self.half + 1) * batch // 2) if shared else slice(None)
        projections = (attention.to_q, attention.to_k, attention.to_v)
        query, key, value = (
            projection(hidden_states[part]).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for projection in projections
        )
        scores = query @ key.transpose(-1, -2) * attention.scale
        full = scores.softmax(-1) @ value
        window = next(iter(decision.windows), self.residual_window)
        positions = torch.arange(tokens)
        far = (positions[:, None] - positions).abs() > window.radius
        near = scores.masked_fill(far, float("-inf")).softmax(-1) @ value
        if decision.kind is Kind.FULL:
            result = full
            residual = full - near
            written[index, "residual"] = residual.repeat(2, 1, 1, 1) if shared else residual
        elif decision.kind is Kind.WINDOW:
            result = near
        elif decision.groups:  # each full or in the window
            heads = enumerate(decision.forms)
            result = torch.stack([(full if form.is_full else near)[:, head] for head, form in heads], 1)
        else:
            result = near + caches[index, "residual"][part]
        output = attention.to_out[0](result.transpose(1, 2).flatten(2))
        output = output.repeat(2, 1, 1) if shared else output
        written[index, "output"] = output
        return output


def sample_plainly(pipe, rows, half=0, residual_window=None, **arguments):
    """Images sampled with ``rows[call][block]`` carried out plainly."""
    plain = PlainSites(pipe.transformer, half, residual_window or Window("band", 4))
    caches, calls = {}, iter(rows)

    def forward(*args, **kwargs):
        output, written = plain.call(next(calls), kwargs, caches, args)
        caches.update(written)
        return output

    pipe.transformer.forward = forward
    try:
        return sample(pipe, steps=len(rows), **arguments)
    finally:
        del pipe.transformer.forward
