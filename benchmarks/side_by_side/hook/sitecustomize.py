"""Watches a training process from outside: no line of the program it watches is changed.

Python imports this file by itself at start, where its folder is on PYTHONPATH. What to do stands in
the environment variable SIDE_BY_SIDE, as JSON:

- `out`: file to write at the last optimizer step, `steps`: how many there will be, `first`: those
  that come before the window that is timed;
- `standin`: folder of a package torchvision, for where there is none that can be imported;
- `stub_vae`: encode each image once and look it up from then on;
- `witness`: folder for what the first step worked on and its gradients, and for every step's loss;
- `count`: the step (from 1) whose dispatched operators are counted;
- `profile`: [first, last] steps (from 1) that torch's profiler watches.

Only the standard library is imported here: the program pays for its own imports, in its own order.
"""

import importlib.abc
import importlib.util
import json
import os
import resource
import sys
import time

TASK = json.loads(os.environ.get("SIDE_BY_SIDE", "null"))
AFTER = {}  # module -> what to do once it is imported
STAMPS = []  # (wall, CPU of all threads) after each optimizer step, s
ABOUT = {}
LOSSES = []


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls AFTER's functions on their modules, as soon as these were run."""

    def find_spec(self, name, path, target=None):
        change = AFTER.pop(name, None)
        if change is None:
            return None
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            change(module)

        spec.loader.exec_module = exec_module
        return spec


class Standin(importlib.abc.MetaPathFinder):
    """Finds the stand-in for torchvision for those who import it, not for those who only ask.

    transformers asks whether torchvision is there, and would then use parts of it that are not.
    """

    def find_spec(self, name, path, target=None):
        if name != "torchvision" or sys._getframe(2).f_globals["__name__"] == "importlib.util":
            return None
        folder = os.path.join(TASK["standin"], "torchvision")
        return importlib.util.spec_from_file_location(
            name, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
        )


def watch_steps(module):
    """torch.optim.optimizer: its own hooks tell of every optimizer's steps."""
    module.register_optimizer_step_post_hook(stamp)


def stamp(optimizer, args, kwargs):
    import torch

    done = len(STAMPS) + 1
    if torch.cuda.is_initialized() and done in (TASK["first"], TASK["steps"]):
        torch.cuda.synchronize()  # the window's ends: what was queued is done
    STAMPS.append((time.perf_counter(), time.process_time()))
    if done == 1:
        ABOUT["optimizer"] = describe(optimizer)
    if TASK.get("count"):
        count(done)
    if TASK.get("profile"):
        profile(done)
    if done == TASK["steps"]:
        write()


def describe(optimizer):
    """What is trained, and how."""
    group = optimizer.param_groups[0]
    parameters = [p for each in optimizer.param_groups for p in each["params"]]
    kept = ("lr", "betas", "weight_decay", "eps", "fused", "foreach", "amsgrad")
    return {
        "kind": type(optimizer).__name__,
        "tensors": len(parameters),
        "parameters": sum(p.numel() for p in parameters),
        "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in parameters}),
        "moments": sorted({
            str(v.dtype).removeprefix("torch.") for p in parameters
            for n, v in optimizer.state[p].items() if n != "step"
        }),
        **{name: group.get(name) for name in kept},
    }  # fmt: skip


def write():
    import torch

    ABOUT["threads"] = torch.get_num_threads()
    ABOUT["peak_rss_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if torch.cuda.is_initialized():
        ABOUT["peak_gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
    ABOUT["losses"] = [float(loss) for loss in LOSSES]
    ABOUT["stamps"] = STAMPS
    with open(TASK["out"], "w") as file:
        json.dump(ABOUT, file)


# The VAE as a table: each image is encoded once.


def stub_vae(module):
    """diffusers' autoencoder_kl: `encode` looks images up that it has seen."""
    import hashlib

    import torch

    encode, known = module.AutoencoderKL.encode, {}
    ABOUT["encoded_at"] = []  # number of the step in which an image was seen for the first time

    def lookup(self, x, return_dict=True):
        few = x.detach().flatten(1)[:, :: max(1, x[0].numel() // 1024)].float().cpu()
        keys = [hashlib.sha1(row.numpy().tobytes()).digest() for row in few]
        for number, key in enumerate(keys):
            if key not in known:
                known[key] = encode(self, x[number : number + 1]).latent_dist.parameters.detach()
                ABOUT["encoded_at"].append(len(STAMPS) + 1)
        latents = module.DiagonalGaussianDistribution(torch.cat([known[key] for key in keys]))
        return module.AutoencoderKLOutput(latent_dist=latents) if return_dict else (latents,)

    module.AutoencoderKL.encode = lookup


# A witness: what the first step saw, and what came of it.

SEEN = {}


def watch_noise(module):
    """diffusers' DDPM scheduler: what the first step is made of."""
    add_noise = module.DDPMScheduler.add_noise

    def watched(self, original_samples, noise, timesteps):
        if "noise" not in SEEN:
            SEEN.update(x0=original_samples.clone(), noise=noise.clone(), t=timesteps.clone())
        return add_noise(self, original_samples, noise, timesteps)

    module.DDPMScheduler.add_noise = watched


def watch_unet(module):
    """diffusers' UNet: what it is told of the prompts, and its parameters' names."""
    forward = module.UNet2DConditionModel.forward

    def watched(self, sample, timestep, encoder_hidden_states, *args, **kwargs):
        if self.training and "embeds" not in SEEN:
            SEEN["embeds"] = encoder_hidden_states.clone()
            SEEN["names"] = {id(p): name for name, p in self.named_parameters()}
        return forward(self, sample, timestep, encoder_hidden_states, *args, **kwargs)

    module.UNet2DConditionModel.forward = watched


def watch_first_step(module):
    """torch.optim.optimizer: weights and gradients as the first step finds them."""

    def keep(optimizer, args, kwargs):
        if STAMPS:
            return
        from safetensors.torch import save_file

        names = SEEN.pop("names")
        tensors = {name: tensor.detach() for name, tensor in SEEN.items()}
        for group in optimizer.param_groups:
            for p in group["params"]:
                tensors[f"weight.{names[id(p)]}"] = p.detach().clone()
                tensors[f"gradient.{names[id(p)]}"] = p.grad.detach().clone()
        kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(kept, os.path.join(TASK["witness"], "first_step.safetensors"))

    module.register_optimizer_step_pre_hook(keep)


def watch_loss(module):
    """torch: the losses that `backward` is called on."""
    backward = module.Tensor.backward

    def watched(self, *args, **kwargs):
        LOSSES.append(self.detach().clone())
        return backward(self, *args, **kwargs)

    module.Tensor.backward = watched


# Where the time goes.


def count(done):
    """Count the operators that reach a kernel in step number TASK["count"]."""
    if done == TASK["count"] - 1:
        from collections import Counter

        from torch.utils._python_dispatch import TorchDispatchMode

        found = Counter()

        class Counting(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                found[str(func)] += 1
                return func(*args, **(kwargs or {}))

        ABOUT["counting"] = Counting()
        ABOUT["counting"].__enter__()
        ABOUT["operators"] = found
    if done == TASK["count"]:
        ABOUT.pop("counting").__exit__(None, None, None)


def profile(done):
    """Watch the steps from TASK["profile"][0] to [1] with torch's profiler."""
    import torch

    first, last = TASK["profile"]
    if done == first - 1:
        activities = [torch.profiler.ProfilerActivity.CPU]
        ABOUT["profiler"] = torch.profiler.profile(activities=activities).__enter__()
    if done == last:
        profiler = ABOUT.pop("profiler")
        profiler.__exit__(None, None, None)
        rows = sorted(profiler.key_averages(), key=lambda row: -row.self_cpu_time_total)
        steps = last - first + 1
        ABOUT["kernels"] = {
            row.key: [row.count / steps, row.self_cpu_time_total / 1000 / steps] for row in rows
        }


if TASK:
    AFTER["torch.optim.optimizer"] = watch_steps
    if TASK.get("stub_vae"):
        AFTER["diffusers.models.autoencoders.autoencoder_kl"] = stub_vae
    if TASK.get("witness"):
        AFTER["torch.optim.optimizer"] = lambda module: (watch_steps(module), watch_first_step(module))
        AFTER["diffusers.schedulers.scheduling_ddpm"] = watch_noise
        AFTER["diffusers.models.unets.unet_2d_condition"] = watch_unet
        AFTER["torch"] = watch_loss
    sys.meta_path.insert(0, AfterImport())
    if TASK.get("standin"):
        sys.meta_path.insert(0, Standin())
