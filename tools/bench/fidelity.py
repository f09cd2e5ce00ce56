"""How far a step of bas differs from the official arithmetic in float32: loss, handle gradient, UNet gradient."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bas.data.batches import Batch
from bas.losses import resize_mask
from bas.runtime.device import autocast
from bas.training.phase_state import trainable_parameters
from tools.bench.bas_side import Mode, configure, start_new, training
from tools.bench.material import Material
from tools.bench.official_loop import Example, OfficialLoop, read_scene


@dataclass(frozen=True)
class Reference:
    """One step's draws, and what the official arithmetic makes of them in float32."""

    example: Example
    latents: Tensor  # (2, 4, h, w), class image first, as all rows here
    noise: Tensor
    t: Tensor
    parts: dict[str, Tensor]  # unweighted losses
    handles: Tensor  # (N, d) gradient
    unet: dict[str, Tensor]  # gradients by name; empty in phase 1


def official_gradients(material: Material, phase: int) -> Reference:
    """The official step on all concepts at once, not mirrored, in float32 without any autocast."""
    loop = OfficialLoop(Path(material.model), list(material.words), material.device, half=False)
    loop.begin(phase)
    scene = read_scene(Path(material.scene), Path(material.class_images))
    concepts = list(range(len(loop.handles)))
    torch.manual_seed(0)
    drawn = loop.draw(scene, 0).pixels[:1]
    prompts = ["a photo at the beach", "a photo of " + " and ".join(loop.handles)]
    example = Example(torch.cat([drawn, scene.image[None]]), loop.tokenize(prompts), scene.masks, concepts)
    latents = loop.encode(example.pixels)
    noise, t = torch.randn_like(latents), torch.tensor([300, 600], device=latents.device)
    loss, parts = loop.losses(example, latents, noise, t)
    loss.backward()
    unet = {name: p.grad.cpu() for name, p in loop.unet.named_parameters() if p.grad is not None}
    handles = loop.embedding.grad[-len(concepts) :].cpu()
    parts = {name: part.detach().cpu() for name, part in parts.items()}  # not the graph, which holds the weights
    return Reference(example, *(x.cpu() for x in (latents, noise, t)), parts, handles, unet)


def to_batch(reference: Reference, handle_ids: list[int], with_prior: bool) -> Batch:
    """The reference's draws as bas's batch: the image first, the class image behind it or left out."""
    rows = [1, 0] if with_prior else [1]
    h, w = reference.latents.shape[-2:]
    masks, ids = reference.example.masks[:, 0], reference.example.input_ids
    places = [(ids[1] == handle_id).nonzero().item() for handle_id in handle_ids]
    return Batch(
        z0=reference.latents[rows],
        eps=reference.noise[rows],
        t=reference.t[rows],
        input_ids=ids[rows],
        union=resize_mask(masks.amax(0, keepdim=True), h, w)[None],
        masks=resize_mask(masks, h // 4, w // 4)[None],
        positions=torch.tensor([places]),
        present=torch.ones(1, len(places)),
    )


def fidelity(reference: Reference, material: Material, mode: Mode, phase: int, run: Path) -> dict[str, float]:
    """Relative errors of loss, handle gradient and UNet gradient of a mode against the reference, and cosines."""
    config = configure(material, mode, phase, run)
    side = start_new(config)
    models, plan = side.models, config.phases[0]
    trained = trainable_parameters(models, plan)
    batch = to_batch(reference, list(side.data.handle_ids), plan.prior).to(models.device)
    resident = models.unet.conv_in.weight.dtype != torch.float32  # 16-bit weights need no autocast
    with autocast(models.device, "no" if resident else side.precision):
        loss, parts = training.training_step(models, batch, config)
    loss.backward()
    weights = {"reconstruction": 1.0, "attention": config.lambda_attention, "prior": config.prior_loss_weight}
    expected = sum(weights[name] * reference.parts[name].item() for name in parts)
    found = {"loss": abs(loss.item() - expected) / abs(expected)}
    handles = trained["handles"].grad.float().cpu()
    found["handles"], found["handles cosine"] = compare([handles], [reference.handles])
    if reference.unet:
        ours = [trained[f"unet.{name}"].grad.float().cpu() for name in reference.unet]
        found["UNet"], found["UNet cosine"] = compare(ours, list(reference.unet.values()))
    return found


def compare(ours: list[Tensor], theirs: list[Tensor]) -> tuple[float, float]:
    """Relative error and cosine of two lists of tensors, each taken as one long vector."""
    square = dot = own = error = 0.0
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.double().flatten(), b.double().flatten()
        square, own, dot = square + (b @ b).item(), own + (a @ a).item(), dot + (a @ b).item()
        error += (a - b).square().sum().item()
    return (error / square) ** 0.5, dot / (square * own) ** 0.5
