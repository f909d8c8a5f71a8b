//! The invariants of ARCHITECTURE.md, "What must not exist", read off the sources.

#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::{Path, PathBuf},
};

/// All Rust sources below a folder (or the one file), tests apart.
fn sources(below: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut pending = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join(below)];
    while let Some(path) = pending.pop() {
        if path.is_dir() {
            pending.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else if path.extension().is_some_and(|extension| extension == "rs")
            && !path.file_stem().unwrap().to_string_lossy().ends_with("tests")
        {
            let text = fs::read_to_string(&path).unwrap();
            found.push((path, text));
        }
    }
    assert!(!found.is_empty(), "{below} has sources");
    found
}

/// Nothing below `below` mentions any of `words` outside comments.
fn never(below: &str, words: &[&str]) {
    for (path, text) in sources(below) {
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap();
            for word in words {
                assert!(!code.contains(word), "{}:{}: {word}", path.display(), number + 1);
            }
        }
    }
}

#[test]
fn models_knows_nothing_of_serving() {
    never("models/src", &["tokio", "axum", "hyper", "clap", "prometheus", "async fn"]);
}

#[test]
fn http_never_names_a_tensor() {
    never("src/http", &["candle_core", "candle_nn", "Tensor::", "&Tensor"]);
}

#[test]
fn the_batcher_is_a_pure_function() {
    never(
        "src/engine/batcher.rs",
        &["candle", "tokio", "Instant", "SystemTime", "Mutex", "Atomic"],
    );
}

#[test]
fn serving_never_imports_distillation() {
    for below in ["src/http", "src/engine", "src/registry.rs", "models/src"] {
        never(below, &["understudy_distill"]);
    }
}

#[test]
fn load_knows_the_server_by_its_answers_alone() {
    never("src/load", &["crate::engine", "crate::http", "crate::registry", "crate::metrics"]);
}

#[test]
fn experiments_know_nothing_of_serving_and_statistics_nothing_of_the_database() {
    let serving = ["axum", "crate::http", "crate::engine", "crate::registry", "candle"];
    never("src/experiments", &serving);
    for pure in ["split", "wilson", "sequential", "tally", "votes", "arms", "traffic", "ballot"] {
        let file = format!("src/experiments/{pure}.rs");
        never(&file, &["redb", "tokio", "Mutex", "SystemTime", "Instant", "getrandom"]);
    }
}

#[test]
fn distillation_knows_nothing_of_serving_nor_of_architectures() {
    let serving = ["tokio", "axum", "hyper", "clap", "prometheus", "async fn", "understudy::"];
    never("distill/src", &serving);
    never("distill/src", &["UNet", "unet", "DiT", "dit::"]);
}

#[test]
fn kernels_and_plans_know_no_architecture() {
    for below in ["models/src/kernels", "models/src/graph", "models/src/cpu", "models/src/gpu"] {
        never(below, &["unet::", "dit::", "UNet", "DiT"]);
    }
}

#[test]
fn there_is_no_global_random_generator() {
    for below in ["src", "models/src", "distill/src"] {
        never(below, &["thread_rng", "rand::random", "Tensor::randn", "Tensor::rand"]);
    }
}

#[test]
fn unsafe_stands_in_kernels_and_where_memory_is_mapped() {
    for below in ["src", "models/src", "distill/src"] {
        for (path, text) in sources(below) {
            let count = text.lines().filter(|line| line.contains("unsafe {")).count();
            let allowed = match path.to_string_lossy() {
                path if path.contains("/kernels/") => usize::MAX,
                path if path.ends_with("src/main.rs") => 1,
                path if path.ends_with("distill/src/pool/rows.rs") => 1,
                path if path.ends_with("src/gpu.rs") => 1,
                path if path.ends_with("gpu/convolution.rs") => 2,
                path if path.ends_with("gpu/convolution/plan.rs") => 5,
                path if path.ends_with("gpu/cudnn.rs") => 11,
                path if path.ends_with("gpu/launch.rs") => 1,
                path if path.ends_with("gpu/lists.rs") => 1,
                path if path.ends_with("gpu/product.rs") => 1,
                path if path.ends_with("sampler/advance/launch.rs") => 2,
                _ => 0,
            };
            assert!(count <= allowed, "{}: {count} unsafe blocks", path.display());
        }
    }
}

#[test]
fn bundled_weights_stay_small() {
    let mut bytes = 0;
    let mut pending = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("models/zoo")];
    while let Some(path) = pending.pop() {
        if path.is_dir() {
            pending.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else {
            bytes += fs::metadata(&path).unwrap().len();
        }
    }
    assert!(bytes < 25_000_000, "{bytes} bytes in models/zoo");
}
