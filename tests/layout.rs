//! The invariants of ARCHITECTURE.md, "What must not exist", read off the sources.

#![allow(clippy::unwrap_used)]

use std::{
    collections::{BTreeMap, BTreeSet},
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
    let pure =
        "split wilson sequential tally votes arms traffic ballot guardrails ramp rollout compared";
    for pure in pure.split(' ') {
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
            let count = text.lines().filter(|line| is_unsafe(line)).count();
            let allowed = match path.to_string_lossy() {
                path if path.contains("/kernels/") => usize::MAX,
                path if path.ends_with("src/main.rs") => 1,
                path if path.ends_with("distill/src/pool/rows.rs") => 1,
                path if path.ends_with("src/gpu.rs") => 1,
                path if path.ends_with("gpu/convolution.rs") => 2,
                path if path.ends_with("gpu/convolution/plan.rs") => 9,
                path if path.ends_with("models/src/cuda_graphs.rs") => 1,
                path if path.ends_with("gpu/cudnn.rs") => 13,
                path if path.ends_with("gpu/launch.rs") => 2,
                path if path.ends_with("gpu/lists.rs") => 1,
                path if path.ends_with("gpu/product.rs") => 1,
                path if path.ends_with("sampler/advance/launch.rs") => 2,
                _ => 0,
            };
            assert!(count <= allowed, "{}: {count} unsafe blocks", path.display());
        }
    }
}

/// Whether a line begins a block that nobody checks, or a function or implementation that promises something.
fn is_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap();
    ["unsafe {", "unsafe fn", "unsafe impl"].iter().any(|word| code.contains(word))
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

/// A module's path, and the file that it is in.
type Modules = BTreeMap<Vec<String>, PathBuf>;

fn modules(below: &str) -> Modules {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(below);
    let module = |(path, _): (PathBuf, String)| {
        let inside = path.strip_prefix(&root).unwrap().with_extension("");
        let mut names: Vec<String> =
            inside.iter().map(|name| name.to_string_lossy().into_owned()).collect();
        names.pop_if(|name| ["mod", "lib", "main"].contains(&name.as_str()));
        (names, path)
    };
    sources(below).into_iter().map(module).collect()
}

/// The paths that a `use` names, its braces taken apart.
fn paths(tree: &str) -> Vec<String> {
    let tree = tree.trim();
    let Some((before, inside)) = tree.split_once('{') else {
        return vec![tree.split(" as ").next().unwrap().to_owned()];
    };
    let (mut parts, mut depth) = (vec![String::new()], 0);
    // A line of a text may begin with the word, too.
    let Some(end) = inside.rfind('}') else { return Vec::new() };
    for letter in inside[..end].chars() {
        depth += i32::from(letter == '{') - i32::from(letter == '}');
        match letter {
            ',' if depth == 0 => parts.push(String::new()),
            _ => parts.last_mut().unwrap().push(letter),
        }
    }
    let parts = parts.iter().filter(|part| !part.trim().is_empty());
    parts.flat_map(|part| paths(part)).map(|part| format!("{before}{part}")).collect()
}

/// The modules that each module imports, but for those inside itself.
fn imports(modules: &Modules) -> BTreeMap<Vec<String>, BTreeSet<Vec<String>>> {
    let of = |(module, path): (&Vec<String>, &PathBuf)| {
        let text = fs::read_to_string(path).unwrap();
        let text: String =
            text.lines().map(|line| line.split("//").next().unwrap().to_owned() + "\n").collect();
        // Tests may import what they like.
        let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
        let text =
            text.split("#[cfg(test)]\n#[allow(clippy::unwrap_used)]\nmod tests {").next().unwrap();
        let mut found = BTreeSet::new();
        for statement in text.split(';') {
            let begins = |line: &str| {
                let words = line.trim_start();
                let uses = ["use ", "pub use ", "pub(crate) use ", "pub(super) use "];
                uses.iter().any(|before| words.starts_with(before))
            };
            let lines: Vec<&str> = statement.lines().collect();
            let Some(first) = lines.iter().rposition(|line| begins(line)) else { continue };
            let whole = lines[first..].join("\n");
            let Some((_, tree)) = whole.split_once("use ") else { continue };
            for path in paths(tree) {
                let mut names: Vec<String> =
                    path.split("::").map(|name| name.trim().to_owned()).collect();
                let mut base = module.clone();
                match names[0].as_str() {
                    "crate" => base.clear(),
                    "super" | "self" => {}
                    _ => continue,
                }
                while ["crate", "super", "self"].contains(&names.first().map_or("", String::as_str))
                {
                    if names.remove(0) == "super" {
                        base.pop();
                    }
                }
                base.extend(names);
                while !modules.contains_key(&base) && !base.is_empty() {
                    base.pop();
                }
                if !base.starts_with(module) {
                    found.insert(base);
                }
            }
        }
        (module.clone(), found)
    };
    modules.iter().map(of).collect()
}

/// Files that import each other because they are one type's methods, or one table's rows.
const TOGETHER: [&[&str]; 5] = [
    // A program's builder, its operations and their gradients.
    &["cpu::builder", "cpu::ops", "cpu::tape"],
    &["gpu::builder", "gpu::parameters", "gpu::program", "gpu::tape"],
    &["gpu::launch", "gpu::machine", "gpu::product"],
    // A kind of file asks its own reader whether it begins so.
    &["data::content", "data::idx"],
    // The document of the operations says who may ask them.
    &["http::docs", "http::operation"],
];

#[test]
fn modules_do_not_import_each_other_in_circles() {
    for below in ["models/src", "distill/src", "src"] {
        let mut imports = imports(&modules(below));
        let together = |one: &[String], other: &[String]| {
            let [one, other] = [one, other].map(|module| module.join("::"));
            let has =
                |all: &&[&str]| [&one, &other].iter().all(|name| all.contains(&name.as_str()));
            TOGETHER.iter().any(has)
        };
        for (module, imported) in &mut imports {
            imported.retain(|other| !together(module, other));
        }
        assert!(imports.values().flatten().count() > 20, "{below}: imports are found");
        for first in imports.keys() {
            // Everything that can be reached from it, each with how.
            let (mut reached, mut pending) = (BTreeSet::new(), vec![vec![first]]);
            while let Some(path) = pending.pop() {
                for next in imports.get(path[path.len() - 1]).into_iter().flatten() {
                    let path = [&path[..], &[next]].concat();
                    let names: Vec<String> = path.iter().map(|module| module.join("::")).collect();
                    assert!(next != first, "{below}: a circle: {}", names.join(" > "));
                    if reached.insert(next) {
                        pending.push(path);
                    }
                }
            }
        }
    }
}
