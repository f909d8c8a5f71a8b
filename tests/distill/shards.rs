//! `distill --shards` as one process; `tests/ranks/run.sh` has several.

use std::process::Command;

use understudy_models::checkpoint::ModelFolder;

use super::{Home, curve, understudy, weights};

fn sharded(home: &Home, out: &str, steps: usize, more: &[&str]) -> (bool, String) {
    let mut arguments = home.arguments("student.json", out, steps);
    arguments.extend(more.iter().map(|&word| word.into()));
    understudy(&arguments)
}

#[test]
fn a_run_of_shards_goes_on_as_if_it_had_not_stopped() {
    let home = Home::new();
    for (out, steps) in [("whole", 20), ("parts", 7), ("parts", 20)] {
        let (done, said) = sharded(&home, out, steps, &["--shards", "4"]);
        assert!(done, "{said}");
    }
    let (whole, parts) = (home.path("whole"), home.path("parts"));
    assert_eq!(curve(&whole).len(), 20);
    assert_eq!(curve(&whole), curve(&parts));
    assert_eq!(weights(&whole), weights(&parts));
    assert_eq!(ModelFolder::open(&whole).unwrap().card.recipe["shards"], 4);
    // A run of as many steps and rows, but cut otherwise.
    for shards in ["1", "2"] {
        let (done, said) = sharded(&home, "whole", 30, &["--shards", shards]);
        assert!(!done && said.contains("another run: `shards` is 4"), "{said}");
    }
}

#[test]
fn what_cannot_be_cut_is_refused_before_anything_is_written() {
    let home = Home::new();
    let pool = home.path("pool").display().to_string();
    for (more, words) in [
        (&["--shards", "3"][..], "`--shards` is 3: must be a power of two"),
        (&["--shards", "8"], "`--shards` is 8: --batch 4 must be a multiple of 8"),
        (&["--shards", "4", "--accumulate", "2"], "--batch 4 must be a multiple of 4 × 2"),
        (&["--shards", "2", "--pool-file", &pool], "leave out --shards 2"),
        (&["--shards", "2", "--method", "data-free-baseline"], "--method data-free-baseline: "),
    ] {
        let (done, said) = sharded(&home, "out", 1, more);
        assert!(!done && said.contains(words), "{said}");
        assert!(!home.path("out").exists() && !home.path("pool").exists());
    }
}

/// What `mpirun` says in the environment.
#[cfg(not(feature = "mpi"))]
#[test]
fn a_build_without_mpi_refuses_to_be_one_of_several() {
    let home = Home::new();
    let mut of_two = Command::new(env!("CARGO_BIN_EXE_understudy"));
    of_two.args(home.arguments("student.json", "out", 1)).args(["--shards", "2"]);
    let output = of_two.env("OMPI_COMM_WORLD_SIZE", "2").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("OMPI_COMM_WORLD_SIZE is 2"), "{said}");
    assert!(said.contains("cargo build --features mpi") && !home.path("out").exists(), "{said}");
}
