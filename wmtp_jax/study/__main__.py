"""From a question to a verdict: python -m wmtp_jax.study --config=configs/studies/toy.py --workdir=studies/toy

A study is arms x seeds of one recipe, declared in a Python file. The command trains what is missing and says what the paired
differences show, with controls. It goes on where it stopped; several processes, on several machines, may share a directory. See
wmtp_jax/study/README.md.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from wmtp_jax import cli
from wmtp_jax.errors import UserError
from wmtp_jax.storage import s3


def main() -> None:
    values = flags.FLAGS
    if values.report and (values.dry_run or values.only):
        raise UserError("--report: makes the output of what is there again; leave out --dry_run and --only")
    # Imported after the flags have been read, so that --help and a wrong flag answer at once.
    from wmtp_jax.study import output, results
    from wmtp_jax.study.conduct import run_study
    from wmtp_jax.study.declaration import check_study, load_study
    from wmtp_jax.study.directory import open_directory
    from wmtp_jax.study.schedule import prepare
    from wmtp_jax.study.tables import plan_text, verdicts

    workdir = values.workdir or f"studies/{Path(values.config).stem}"
    if values.report:
        directory = open_directory(workdir)
        study = results.read_study(directory)
        if study is None:
            raise UserError(f"--workdir={workdir}: no {results.FILE} there; run the study first, without --report")
        study = results.fill(study, directory)
    else:
        name, declared = load_study(values.config)
        schedule = prepare(check_study(name, declared))
        if values.dry_run:
            print(plan_text(schedule.record))
            return
        directory = open_directory(workdir)
        study = run_study(schedule, directory, jobs_at_once=values.jobs, only=values.only)
    results.write_study(directory, study)
    written = output.write_output(study, directory)
    if not s3.is_remote(workdir):
        output.update_page_above(study, Path(workdir))
    finished, failed, wanted = results.progress(study)
    print(f"{study['question']}\n{finished} of {wanted} runs finished" + (f", {failed} failed" if failed else ""))
    print("\n".join(f"- {sentence}" for sentence in verdicts(study)))
    print(f"{directory.address}: " + ", ".join([results.FILE, *written]))


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "The study: configs/studies/NAME.py, a Python file with get_study().")
    flags.DEFINE_string(
        "workdir",
        None,
        "The study's directory, here or at s3://BUCKET/PREFIX/NAME; processes that name the same one share the study. By default "
        "studies/NAME.",
    )
    flags.DEFINE_bool("dry_run", False, "Check everything, print arms, runs and costs, and train nothing.")
    flags.DEFINE_integer("jobs", 1, "Runs at the same time; the cores of this process are shared out among them.")
    flags.DEFINE_list("only", [], "Run these arms alone, ARM[,ARM...].")
    flags.DEFINE_bool(
        "report", False, "Make tables, figures and page again from study.json and results/, and train nothing."
    )
    cli.run(main, description=__doc__, required=("config",))
