"""`jax-ddpm convert` and `export`: a model in the files of others, and as a program of its own."""

from jax_ddpm._errors import check_positive
from jax_ddpm.cli.common import load_chain, make_sampler
from jax_ddpm.cli.config import ConvertConfig, ExportConfig
from jax_ddpm.cli.errors import UsageError, check_file, naming, writing
from jax_ddpm.interop import DiffusionModel, save_diffusers, simple_unet_to_torch, unet_to_torch
from jax_ddpm.interop.diffusers import check_words, is_hub_name
from jax_ddpm.io.arrays import save_tensors
from jax_ddpm.models import SimpleUNet, UNet
from jax_ddpm.runs import export as export_run
from jax_ddpm.runs import load_model, save_run


def convert(config: ConvertConfig) -> None:
    """Read `config.source`, whatever it is, and write it as `config.to` says."""
    if not config.source.exists() and not is_hub_name(config.source):
        raise UsageError(f"SOURCE: no such file or folder: {config.source}")
    names = ("weights", "openai_flags", "image_size", "revision", "variant")
    with naming(folder="SOURCE"):
        run = load_model(config.source, **{name: getattr(config, name) for name in names})
    if config.out.exists():
        raise UsageError(f"OUT: {config.out} exists already")
    if not config.out.parent.is_dir():
        raise UsageError(f"OUT: no such folder: {config.out.parent}")
    try:
        with writing("OUT", config.out):
            hint = _write(config, run)
    except ValueError as error:
        raise UsageError(f"--to {config.to}: {error}") from None
    print(f"wrote {config.out}\n\nnext: {hint}")


def _write(config: ConvertConfig, run: DiffusionModel) -> str:
    """What to do with it next."""
    if config.to == "run":
        save_run(config.out, run)
        return f"jax-ddpm sample {config.out}"
    if config.to == "diffusers":
        save_diffusers(config.out, run)
        hint = f"DDPMPipeline.from_pretrained({str(config.out)!r})"
        # The pipeline itself draws no classes.
        return hint if run.num_classes is None else f"{hint}.unet(x, t, class_labels=labels)"
    if config.out.suffix != ".safetensors":
        raise UsageError(f"OUT: expected a .safetensors file, got {config.out}")
    model = run.model
    simple = isinstance(model, SimpleUNet)
    if isinstance(model, UNet):
        check_words(model)
    to_torch = simple_unet_to_torch if simple else unet_to_torch
    save_tensors(config.out, to_torch(run.variables))
    network = "SimpleUNet" if simple else "UNet2DModel"
    file = f"safetensors.torch.load_file({str(config.out)!r})"
    return f"model.load_state_dict({file}), of a {network}"


def export(config: ExportConfig) -> None:
    """Export as `config` says, and write the file and its manifest."""
    check_positive(steps=config.steps)
    check_file("--out", config.out, ".jaxexport")
    sampler = make_sampler(config)
    extra = {name: getattr(config, name) for name in ("sampler", "eta", "order", "stochastic")}
    run = load_chain(config)
    with writing("--out", config.out):
        manifest = export_run(
            config.out,
            run,
            steps=config.steps,
            sampler=sampler,
            platforms=config.platforms,
            extra=extra,
        )
    print(
        f"wrote {config.out}: {manifest['bytes'] / 1e6:,.1f} MB, {manifest['steps']} "
        f"{config.sampler} steps, for {', '.join(manifest['platforms'])}\n"
        f"wrote {config.out}.json, which says what it is\n\n"
        "next, with nothing but `pip install jax flatbuffers`:\n"
        f'  sampler = jax.export.deserialize(bytearray(open("{config.out}", "rb").read()))\n'
        f"  images = sampler.{manifest['call']}\nwhere"
    )
    for name, meaning in manifest["arguments"].items():
        print(f"  {name:<10}{meaning}")
