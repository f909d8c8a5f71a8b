//! Which ranks NCCL connects: those that have a GPU of their own each.

use understudy_models::{Error, Result};

/// What its driver calls a GPU, and no other one anywhere.
pub(super) type Uuid = [u8; 16];

/// Whether ranks, of which each tells its GPU or that it has none, exchange from GPU to GPU.
///
/// # Errors
/// [`Error::Value`] for ranks that NCCL does not connect: two on one GPU, or one without.
pub(super) fn between_gpus(ranks: &[Option<Uuid>]) -> Result<bool> {
    let refuse = |rank: usize, problem: String| {
        let remedy = format!(
            "{problem}; give each rank a GPU of its own (srun --gpus-per-task=1; Open MPI: mpirun -n {} sh -c \
             'CUDA_VISIBLE_DEVICES=$OMPI_COMM_WORLD_LOCAL_RANK exec understudy distill …'), all of them --device cpu, or use a build \
             with --features cuda,mpi, whose gradients go through host memory",
            ranks.len()
        );
        Err(Error::value("rank", rank, remedy))
    };
    if ranks.len() == 1 || ranks.iter().all(Option::is_none) {
        return Ok(false);
    }
    for (rank, gpu) in ranks.iter().enumerate() {
        let Some(gpu) = gpu else {
            return refuse(rank, "has no GPU, and others have; NCCL connects GPUs".into());
        };
        if let Some(other) = ranks[..rank].iter().position(|other| *other == Some(*gpu)) {
            return refuse(
                rank,
                format!("is on the GPU of rank {other}; NCCL takes one rank for each"),
            );
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn ranks_with_a_gpu_each_exchange_between_them() {
        let gpu = |number| Some([number; 16]);
        for (ranks, between) in [
            (&[None][..], false),
            (&[gpu(1)], false),
            (&[None, None], false),
            (&[gpu(1), gpu(2)], true),
            (&[gpu(1), gpu(2), gpu(3), gpu(4)], true),
        ] {
            assert_eq!(between_gpus(ranks).unwrap(), between, "{ranks:?}");
        }
        for (ranks, words) in [
            (
                &[gpu(1), gpu(1)][..],
                "`rank` is 1: is on the GPU of rank 0; NCCL takes one rank for each",
            ),
            (&[gpu(1), gpu(2), gpu(3), gpu(2)], "`rank` is 3: is on the GPU of rank 1"),
            (&[gpu(1), None], "`rank` is 1: has no GPU, and others have"),
            (&[None, gpu(1)], "`rank` is 0: has no GPU"),
        ] {
            let problem = between_gpus(ranks).unwrap_err().to_string();
            assert!(
                problem.contains(words) && problem.contains("--features cuda,mpi"),
                "{problem}"
            );
        }
    }
}
