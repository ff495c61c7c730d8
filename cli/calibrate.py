"""`prestage calibrate` and `prestage benchmark`: what a GPU takes, measured, fitted and proved."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from .console import print_json, progress_shown, say_replaced
from .options import Json, Settings

app = typer.Typer(help="Measure a GPU, fit its profile, and prove it.", no_args_is_help=True)
benchmark_app = typer.Typer(help="Benchmark this machine, or show what was measured on another.", no_args_is_help=True)


@app.command("measure")
def calibrate_measure(
    out: Annotated[Path, typer.Option("--out", "-o", help="The file of samples to write.")] = Path("samples.json"),
    device: Annotated[int, typer.Option(help="Which CUDA GPU.")] = 0,
    quick: Annotated[bool, typer.Option(help="Fewer sizes, one model and two rounds: a minute, not four.")] = False,
    links: Annotated[bool, typer.Option(help="Only what several GPUs of one machine add.")] = False,
    surface: Annotated[
        bool, typer.Option(help="Only the surface of single kernels, from which any model's are put together.")
    ] = False,
    low_bit: Annotated[
        bool,
        typer.Option(help="Only products of weights in 8 and 4 bits, to be fitted together with a surface's samples."),
    ] = False,
    launches: Annotated[
        bool,
        typer.Option(help="Only what calls of products take of the host, and how many kernels they launch."),
    ] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(help="A model (a preset or a file) whose kernels are measured as points of their own; repeat it."),
    ] = None,
    drive: Annotated[
        Path | None,
        typer.Option(help="Only reads from a drive: a file to write there, read past the cache, and remove."),
    ] = None,
) -> None:
    """Measure what copies, kernels and calls take on a CUDA GPU, and keep every sample."""
    from ..calibration.device.cuda import Gpu
    from ..calibration.fit.evidence import sample_rows
    from ..calibration.measure.bench import with_models
    from ..calibration.measure.drive import measure_drive
    from ..calibration.measure.exchanges import measure_collectives
    from ..calibration.measure.launches import measure_launches
    from ..calibration.measure.measure import FULL, LINKS, PROBES, QUICK, described, measure
    from ..calibration.measure.surface import FULL_GRID, LOW_BIT_GRID, measure_surface, surface_samples
    from ..files import check_file

    check_file(out)
    alone = {"--drive": drive is not None, "--surface": surface, "--low-bit": low_bit, "--launches": launches}
    given = [name for name, is_given in alone.items() if is_given]
    if given and (len(given) > 1 or links or quick or model):
        others = ", ".join(name for name in alone if name != given[0])
        what = {"--drive": "the drive", "--surface": "the surface"}.get(given[0], "these products")
        raise InputError(f"{given[0]}: measures {what} alone: leave out {others}, --links, --quick and --model")
    extent = with_models(QUICK if quick else FULL, model or ())
    gpu = Gpu(device)
    if links and gpu.count() < 2:
        raise InputError("--links: torch finds one GPU only")
    if out.exists():
        say_replaced(out, "file")
    with progress_shown() as progress:
        if drive is not None:
            samples = described(gpu, measure_drive(drive))
        elif launches:
            samples = surface_samples(gpu, measure_launches(gpu, progress=progress))
        elif surface or low_bit:
            grid = LOW_BIT_GRID if low_bit else FULL_GRID
            samples = surface_samples(gpu, measure_surface(gpu, grid, progress=progress))
        else:
            samples = measure(gpu, extent, progress, LINKS if links else PROBES)
            if links:
                samples.save(out)  # whatever becomes of the processes
                more = measure_collectives(gpu.count())
                samples = samples.model_copy(update={"series": samples.series + more})
            if not links and not quick:
                samples = samples.model_copy(update={"surface": measure_surface(gpu, progress=progress)})
    samples.save(out)
    noisy = sum(row.noisy for row in sample_rows([samples]))
    shapes = "shapes of products" if launches else "shapes of the surface"
    then = "" if launches else f"; next: prestage calibrate fit {out} -o PROFILE.json"
    typer.echo(
        f"{out}: {len(samples.series)} series, {noisy} of them with an interquartile range over 10 % of the median, "
        f"and {len(samples.surface)} {shapes}{then}"
    )


@app.command("fit")
def calibrate_fit(
    samples: Annotated[
        list[Path],
        typer.Argument(help="The samples that `calibrate measure` wrote; further files give what the first lacks."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The profile to write; its name is the file's.")],
    in_schedule: Annotated[
        list[Path] | None,
        typer.Option(
            help="Measured runs, folders of them, or rows (.rows.json): costs as they are inside schedules; repeat it."
        ),
    ] = None,
    topology: Annotated[
        str | None,
        typer.Option(help="A profile whose graph of several GPUs is this machine's: how fast its links are is fitted."),
    ] = None,
    extends: Annotated[
        str | None,
        typer.Option(help="The profile of one such GPU: write what several of one machine add to it (--topology)."),
    ] = None,
    rows_out: Annotated[
        Path | None, typer.Option(help="Also write what the runs show as rows (.rows.json), far smaller than the runs.")
    ] = None,
    json: Json = False,
) -> None:
    """Fit a profile to samples: each cost with how well it predicts the samples that were held back."""
    from ..calibration.fit.evidence import check_rows_file, load_schedule, save_rows
    from ..calibration.fit.fit import fit, fit_data, write_profile
    from ..calibration.fit.links import links_of, write_links
    from ..calibration.measure.samples import load_samples
    from ..files import check_file
    from ..resources.profile import load_profile

    for path in filter(None, (out, rows_out)):
        check_file(path)
    if rows_out is not None:
        check_rows_file(rows_out)
    rows = load_schedule(in_schedule or ())
    first, *more = (load_samples(path) for path in samples)
    graph = None if topology is None else load_profile(topology).topology
    if topology is not None and graph is None:
        raise InputError(f"--topology {topology}: that profile has no topology")
    if extends is not None:
        load_profile(extends)
        if topology is None:
            raise InputError(f"--extends {extends}: what several GPUs add needs --topology, too")
    fitted = fit(first, out.name.removesuffix(".json"), rows, more, graph)
    if rows_out is not None:
        save_rows(rows, rows_out)
    if extends is None:
        write_profile(fitted.profile, out)
    else:
        write_links(links_of(fitted.profile, first, extends), out)
    if json:
        print_json(fit_data(fitted))
        return
    from ..output.tables.measured import print_calibration

    print_calibration(fit_data(fitted))
    typer.echo(str(out))


@app.command("fit-beside")
def calibrate_fit_beside(
    runs: Annotated[list[Path], typer.Argument(help="Measured runs or folders of them: of the set `fit-beside`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The profile to write; its name is the file's.")],
    base: Annotated[str, typer.Option("--base", help="The profile that it extends.")] = "h200",
    drive: Annotated[
        Path | None, typer.Option(help="The samples of a drive that `calibrate measure --drive` wrote.")
    ] = None,
    links: Annotated[
        Path | None,
        typer.Option(help="The samples that `calibrate measure --links` wrote: exchanges of sizes that no run has."),
    ] = None,
) -> None:
    """Fit what runs beside the GPU's stream: the CPU, a drive, decompression, grouped kernels, exchanges of tokens."""
    from ..calibration.executor.measured import load_all
    from ..calibration.fit.beside import fit_beside, written
    from ..calibration.measure.samples import load_samples
    from ..files import check_file, write_file

    check_file(out)
    apart = [None if path is None else load_samples(path) for path in (drive, links)]
    data = fit_beside(load_all(runs), *apart)
    text, _ = written(data, out.name.removesuffix(".json"), base)
    write_file(out, text.encode() + b"\n")
    typer.echo(str(out))


@app.command("fit-run")
def calibrate_fit_run(
    scenario: Annotated[str, typer.Argument(help="The run's scenario: a TOML file, or a shipped one's name.")],
    log: Annotated[Path, typer.Argument(help="The run's log, token by token (BigMoeOnEdge's --csv).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The profile to write; its name is the file's.")],
    tokens: Annotated[int, typer.Option(help="Fit to so many tokens from the first; no other is looked at.")],
    settings: Settings = None,
    json: Json = False,
) -> None:
    """Fit a drive, its lanes and the compute to the beginning of a published run."""
    from ..calibration.fit.fit import write_profile
    from ..calibration.published.run import fit_run, fit_text, load_log
    from ..engine.scenario.scenario import load_scenario
    from ..files import check_file

    check_file(out)
    fitted = fit_run(load_scenario(scenario, settings or ()), load_log(log), tokens, out.name.removesuffix(".json"))
    write_profile(fitted.profile, out)
    if json:
        print_json(fitted.terms)
        return
    typer.echo(fit_text(fitted, tokens))
    typer.echo(str(out))


@app.command("check-run")
def calibrate_check_run(
    scenario: Annotated[str, typer.Argument(help="The run's scenario: a TOML file, or a shipped one's name.")],
    log: Annotated[Path, typer.Argument(help="The run's log, token by token (BigMoeOnEdge's --csv).")],
    after: Annotated[int, typer.Option(help="Compare the tokens after so many, which the profile was fitted to.")],
    settings: Settings = None,
    json: Json = False,
) -> None:
    """Simulate a published run and compare its tokens with the log, and with a straight line in bytes read."""
    from ..calibration.published.run import check_run, check_text, load_log
    from ..engine.scenario.scenario import load_scenario

    report = check_run(load_scenario(scenario, settings or ()), load_log(log), after)
    if json:
        print_json(report)
        return
    typer.echo(check_text(report))


@app.command("check-kernels")
def calibrate_check_kernels(
    samples: Annotated[list[Path], typer.Argument(help="Samples of kernels: single ones, or groups of models.")],
    profile: Annotated[str, typer.Option(help="The profile whose surface is checked.")] = "h200",
    json: Json = False,
) -> None:
    """Compare kernels that were measured with what a profile's surface says of them: shapes that it does not hold."""
    from ..calibration.fit.check_kernels import check_kernels, check_text, summary
    from ..calibration.measure.samples import load_samples
    from ..resources.profile import load_profile

    checked = check_kernels([load_samples(path) for path in samples], load_profile(profile))
    if not checked:
        raise InputError("none of these files has kernels in graphs with nothing beside them")
    if json:
        print_json({"profile": profile, "kernels": summary(checked)})
        return
    typer.echo(check_text(checked))


@app.command("execute")
def calibrate_execute(
    scenarios: Annotated[
        list[str],
        typer.Argument(
            help="TOML files, shipped names, sets (validation, two-gpus, beside, shared; fit ones too) or one of a set."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="The file to write (.json, .json.gz), or a folder for several scenarios."),
    ],
    device: Annotated[int, typer.Option(help="Which CUDA GPU.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, max=10_000, help="How many repeats; the median one is written.")] = 5,
    all_repeats: Annotated[bool, typer.Option(help="Write the times of all repeats.")] = False,
    profiler: Annotated[
        Path | None, typer.Option(help="Also run once under PyTorch's profiler and write its trace (.json, .json.gz).")
    ] = None,
    drive: Annotated[
        Path | None,
        typer.Option(help="A file to write, and remove, on the drive that experts are read from (tiers.host_budget)."),
    ] = None,
    keep_going: Annotated[bool, typer.Option(help="Go on with the next scenario when one fails.")] = False,
    settings: Settings = None,
) -> None:
    """Execute scenarios on a CUDA GPU, with the decisions that a simulation makes, timed by CUDA events."""
    from ..calibration.executor.execute import chosen_scenarios, execute_all
    from ..files import check_file, made_folder

    chosen = chosen_scenarios(scenarios, settings or ())
    single = out.name.endswith((".json", ".json.gz"))
    if single and len(chosen) > 1:
        raise InputError(f"--out {out}: {len(chosen)} scenarios need a folder")
    if profiler is not None and len(chosen) > 1:
        raise InputError(f"--profiler {profiler}: one trace holds one scenario, and {len(chosen)} are to be executed")
    for path in filter(None, (out if single else None, profiler, drive)):
        check_file(path)
    failures: list[str] = []

    def say_failed(name: str, error: Exception) -> None:
        failures.append(name)
        typer.echo(f"{name}: failed: {type(error).__name__}: {error}", err=True)

    with nullcontext() if single else made_folder(out), progress_shown() as progress:
        runs = execute_all(
            chosen, device=device, repeats=repeats, keep_all=all_repeats, profile=profiler, drive=drive,
            progress=progress, failed=say_failed if keep_going else None,
        )  # fmt: skip
        if not single:
            out.mkdir(parents=True, exist_ok=True)
        for run in runs:
            path = out if single else out / f"{run.name}.json.gz"
            run.save(path)
            typer.echo(f"{path}: {run.makespan_ns / 1e6:.3f} ms, spread {run.spread:.2%}, {run.disturbed} disturbed")
    if failures:
        raise typer.Exit(1)


@app.command("validate")
def calibrate_validate(
    profile: Annotated[str, typer.Option("--profile", help="The profile: a shipped one's name or a JSON file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for validation.json, .md and .png.")],
    scenarios: Annotated[
        list[str] | None, typer.Argument(help="Scenarios, as `execute` takes them; without any, the set `validation`.")
    ] = None,
    measured: Annotated[
        list[Path] | None, typer.Option(help="Measured runs or folders of them, in place of executing; repeat it.")
    ] = None,
    device: Annotated[int, typer.Option(help="Which CUDA GPU executes the scenarios.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, max=10_000, help="How many repeats are executed.")] = 5,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Largest error of a makespan, unless the machine's own spread is larger.")
    ] = 0.05,
    ablate: Annotated[bool, typer.Option(help="Also simulate with each term of the costs left out.")] = False,
    replicates: Annotated[
        int,
        typer.Option(min=0, max=10_000, help="Also simulate so many times with costs drawn from their uncertainty."),
    ] = 0,
) -> None:
    """Compare simulated with measured makespans; exit status 1 if one is off by more than the tolerance.

    With --measured no GPU is needed.
    """
    from ..calibration.executor.execute import chosen_scenarios, execute_all
    from ..calibration.executor.measured import load_all
    from ..calibration.validate.report import markdown, write_report
    from ..calibration.validate.validate import failures, validate
    from ..resources.profile import load_profile

    costs = load_profile(profile)
    with progress_shown() as progress:
        if measured:
            runs = load_all(measured, scenarios or ())
        else:
            chosen = chosen_scenarios(scenarios or ["validation"])
            runs = list(execute_all(chosen, device=device, repeats=repeats, progress=progress))
        report = validate(runs, costs, ablate=ablate, replicates=replicates, progress=progress)
    written = write_report(report, out)
    typer.echo(markdown(report, every_row=True))
    for path in written:
        typer.echo(path)
    failed = failures(report["rows"], tolerance)
    for line in failed:
        typer.echo(line, err=True)
    if failed:
        raise typer.Exit(1)


@benchmark_app.command("transfer")
def benchmark_transfer(
    samples: Annotated[Path | None, typer.Option(help="Samples that `calibrate measure` wrote.")] = None,
    profile: Annotated[str | None, typer.Option(help="A profile: a shipped one's name or a JSON file.")] = None,
    device: Annotated[int | None, typer.Option(help="Measure this CUDA GPU now (without all three: 0).")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A picture of throughput over size to write.")] = None,
    json: Json = False,
) -> None:
    """Copies and allocations as the guide's table has them: one, ten in a row, throughput; for many models' experts."""
    from ..calibration.fit import transfer

    if sum(source is not None for source in (samples, profile, device)) > 1:
        raise InputError("--samples, --profile, --device: give one of them")
    if samples is not None:
        from ..calibration.measure.samples import load_samples

        report = transfer.from_samples(load_samples(samples))
    elif profile is not None:
        from ..resources.profile import load_profile

        report = transfer.from_profile(load_profile(profile))
    else:
        from ..calibration.device.cuda import Gpu
        from ..calibration.measure.measure import FULL, TRANSFERS, measure

        gpu = Gpu(device or 0)
        with progress_shown() as progress:
            report = transfer.from_samples(measure(gpu, FULL, progress, TRANSFERS))
    if out is not None:
        from ..output.pictures import save
        from ..output.plots import plot_transfer

        save(plot_transfer(report), out)
    if json:
        print_json(report)
        return
    from ..output.tables.measured import print_transfer

    print_transfer(report)
    if out is not None:
        typer.echo(str(out))
