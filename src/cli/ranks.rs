//! Launchers that start a program several times: `mpirun`, `srun`. `distill` is shared by the processes, in a build that has MPI;
//! every other training is one process, so several would write one folder.

use std::env;

use understudy_distill::ranks::{Alone, World};

/// The number of processes that MPI's launchers made, by Open MPI, MPICH with Intel MPI, and MVAPICH.
const SIZES: [&str; 3] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"];

/// What a launcher says of how often it started this command.
struct Launch {
    /// The variable of the environment.
    name: &'static str,
    /// More than 1.
    count: u64,
}

/// Refuses a training that was started several times at once; `work` says what is one process.
///
/// # Errors
/// A sentence that names the variable which says so.
pub(super) fn one_alone(work: &str) -> Result<(), String> {
    launched(|name| env::var(name).ok()).map_or(Ok(()), |launch| Err(launch.refused(work)))
}

/// Does `work` with the other processes that a launcher started with this one, or alone where none did. A process that fails ends
/// the others.
///
/// # Errors
/// Those of `work`; a sentence where the processes cannot meet.
pub(super) fn together(work: impl FnOnce(&dyn World) -> Result<(), String>) -> Result<(), String> {
    match launched(|name| env::var(name).ok()) {
        None => work(&Alone),
        Some(launch) => launch.shared(work),
    }
}

fn launched(variable: impl Fn(&str) -> Option<String>) -> Option<Launch> {
    let number = |name: &str| variable(name)?.trim().parse::<u64>().ok();
    let said = SIZES.into_iter().find_map(|name| Some((name, number(name).filter(|n| *n > 1)?)));
    // A batch script has SLURM_NTASKS, too, and runs once, as process 0; srun tells the processes of its step apart.
    let step = || Some(("SLURM_STEP_NUM_TASKS", number("SLURM_STEP_NUM_TASKS")?));
    let later = || {
        number("SLURM_PROCID").filter(|process| *process > 0)?;
        Some(("SLURM_NTASKS", number("SLURM_NTASKS")?))
    };
    let (name, count) = said.or_else(step).or_else(later)?;
    (count > 1).then_some(Launch { name, count })
}

impl Launch {
    fn refused(&self, work: &str) -> String {
        let Self { name, count } = self;
        format!(
            "{name} is {count}: this command was started {count} times at once, and each would train by itself and write the same folder; {work}, so start it without mpirun or srun, or with one task (mpirun -n 1, srun -n 1)"
        )
    }

    #[cfg(not(feature = "mpi"))]
    fn shared(&self, _: impl FnOnce(&dyn World) -> Result<(), String>) -> Result<(), String> {
        Err(self.refused("this build has no MPI (`cargo build --features mpi` makes one that shares a distillation), and a training is one process"))
    }

    #[cfg(feature = "mpi")]
    fn shared(&self, work: impl FnOnce(&dyn World) -> Result<(), String>) -> Result<(), String> {
        let world = understudy_distill::ranks::Mpi::open()?;
        let (rank, size) = (world.rank(), world.size());
        let Self { name, count } = self;
        if size as u64 != *count {
            return Err(format!(
                "{name} is {count}, and MPI knows of {size}: the launcher is not of the MPI that this program was built with; start it by that one's mpirun (or srun --mpi=pmix)"
            ));
        }
        match super::faults::caught(|| work(&world)) {
            Some(Ok(())) => Ok(()),
            Some(Err(problem)) => {
                let problem = format!("rank {rank} of {size}: {problem}");
                if world.is_open() {
                    super::tell(problem.clone());
                    world.abort(1);
                }
                Err(problem)
            }
            // It has been told where it happened.
            None => {
                world.abort(1);
                Err(format!("rank {rank} of {size}: ended by a fault"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_processes_are_refused_and_one_is_not() {
        let of = |set: &'static [(&str, &str)]| {
            let launch = launched(|name| {
                let found = set.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| (*value).to_owned())
            });
            launch.map(|launch| launch.refused("a training is one process"))
        };
        for set in [
            &[][..],
            &[("OMPI_COMM_WORLD_SIZE", "1")],
            &[("PMI_SIZE", "none")],
            // A batch script of Slurm, and a step of one process in it.
            &[("SLURM_NTASKS", "4"), ("SLURM_PROCID", "0")],
            &[("SLURM_NTASKS", "4"), ("SLURM_PROCID", "0"), ("SLURM_STEP_NUM_TASKS", "1")],
        ] {
            assert_eq!(of(set), None, "{set:?}");
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
            let said = of(set).unwrap();
            assert!(said.starts_with(name) && said.contains("mpirun -n 1"), "{said}");
        }
    }

    #[cfg(not(feature = "mpi"))]
    #[test]
    fn a_build_without_mpi_names_the_feature() {
        let launch = Launch { name: "PMI_SIZE", count: 2 };
        let said = launch.shared(|_| Ok(())).unwrap_err();
        assert!(said.contains("PMI_SIZE is 2") && said.contains("--features mpi"), "{said}");
    }
}
