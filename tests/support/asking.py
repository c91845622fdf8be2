"""A tiny pipeline whose model asks its inputs: the sizes in its graph follow from how many tokens a mask shows."""

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from diffusers.utils import BaseOutput

from tests.support.tiny_pipelines import TwoCalls, quiet, tiny_transformer

TOKENS = 6


class AskingTransformer(DiTTransformer2DModel):
    """The mean of the tokens that a mask shows is added to the noisy sample."""

    def forward(self, hidden_states, timestep, class_labels, text, mask):
        added = text[:, : int(mask[0].sum())].mean(1).view(-1, 1, 1, 1)
        return super().forward(hidden_states + added, timestep=timestep, class_labels=class_labels, return_dict=False)


class AskingPipeline(TwoCalls):
    """Guidance in two calls; both see the same text, ``(images, TOKENS)``, and the same mask of it."""

    @torch.no_grad()
    def __call__(self, class_labels, text=None, mask=None, generator=None, num_inference_steps=4, output_type="np"):
        count = len(class_labels)
        text = torch.linspace(-1, 1, TOKENS).repeat(count, 1) if text is None else text.repeat(count, 1)
        mask = (torch.arange(TOKENS) < 4).repeat(count, 1) if mask is None else mask.repeat(count, 1)
        latents = torch.randn(count, 1, 8, 8, generator=generator)
        labels = {"cond": torch.tensor(class_labels), "uncond": torch.full((count,), 1000)}
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.progress_bar(self.scheduler.timesteps):
            noise = {}
            for name, classes in labels.items():
                noise[name] = self.transformer(latents, t.expand(count), classes, text, mask)[0]
            guided = noise["uncond"] + 4 * (noise["cond"] - noise["uncond"])
            latents = self.scheduler.step(guided, t, latents).prev_sample
        return BaseOutput(images=latents.permute(0, 2, 3, 1).numpy())


def asking_pipeline():
    plain = tiny_transformer()
    model = AskingTransformer(**{name: plain.config[name] for name in (
        "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "num_layers", "sample_size",
        "patch_size",
    )}).eval()  # fmt: skip
    model.load_state_dict(plain.state_dict())
    return quiet(AskingPipeline(model, DDIMScheduler()))
