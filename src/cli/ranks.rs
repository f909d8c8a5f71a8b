//! Launchers that start a program several times: `mpirun`, `srun`. A training is one process, so several would write one folder.

use std::env;

/// The number of processes that MPI's launchers made, by Open MPI, MPICH with Intel MPI, and MVAPICH.
const SIZES: [&str; 3] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"];

/// Refuses a training that was started several times at once.
///
/// # Errors
/// A sentence that names the variable which says so.
pub(super) fn one_alone() -> Result<(), String> {
    refused(|name| env::var(name).ok())
}

fn refused(variable: impl Fn(&str) -> Option<String>) -> Result<(), String> {
    let number = |name: &str| variable(name)?.trim().parse::<u64>().ok();
    let said = SIZES.into_iter().find_map(|name| Some((name, number(name).filter(|n| *n > 1)?)));
    // A batch script has SLURM_NTASKS, too, and runs once, as process 0; srun tells the processes of its step apart.
    let step = || Some(("SLURM_STEP_NUM_TASKS", number("SLURM_STEP_NUM_TASKS")?));
    let later = || {
        number("SLURM_PROCID").filter(|process| *process > 0)?;
        Some(("SLURM_NTASKS", number("SLURM_NTASKS")?))
    };
    match said.or_else(step).or_else(later) {
        Some((name, count)) if count > 1 => Err(format!(
            "{name} is {count}: this command was started {count} times at once, and each would train by itself and write the same folder; a training is one process, so start it without mpirun or srun, or with one task (mpirun -n 1, srun -n 1)"
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_processes_are_refused_and_one_is_not() {
        let of = |set: &'static [(&str, &str)]| {
            refused(|name| {
                let found = set.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| (*value).to_owned())
            })
        };
        for set in [
            &[][..],
            &[("OMPI_COMM_WORLD_SIZE", "1")],
            &[("PMI_SIZE", "none")],
            // A batch script of Slurm, and a step of one process in it.
            &[("SLURM_NTASKS", "4"), ("SLURM_PROCID", "0")],
            &[("SLURM_NTASKS", "4"), ("SLURM_PROCID", "0"), ("SLURM_STEP_NUM_TASKS", "1")],
        ] {
            assert_eq!(of(set), Ok(()), "{set:?}");
        }
        for (set, name) in [
            (&[("OMPI_COMM_WORLD_SIZE", "4")][..], "OMPI_COMM_WORLD_SIZE is 4"),
            (&[("PMI_SIZE", "2"), ("PMI_RANK", "0")], "PMI_SIZE is 2"),
            (&[("MV2_COMM_WORLD_SIZE", "8")], "MV2_COMM_WORLD_SIZE is 8"),
            (
                &[("SLURM_NTASKS", "4"), ("SLURM_PROCID", "0"), ("SLURM_STEP_NUM_TASKS", "4")],
                "SLURM_STEP_NUM_TASKS is 4",
            ),
            (&[("SLURM_NTASKS", "4"), ("SLURM_PROCID", "3")], "SLURM_NTASKS is 4"),
        ] {
            let said = of(set).unwrap_err();
            assert!(said.starts_with(name) && said.contains("mpirun -n 1"), "{said}");
        }
    }
}
