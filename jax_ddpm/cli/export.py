"""`jax-ddpm export`: the whole sampler, weights included, as one StableHLO file."""

from jax_ddpm._errors import check_positive
from jax_ddpm.cli.common import load_chain, make_sampler
from jax_ddpm.cli.config import ExportConfig
from jax_ddpm.cli.errors import check_file, writing
from jax_ddpm.runs import export as export_run


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
