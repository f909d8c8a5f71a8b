//! The image can be built: what `.dockerignore` lets through is a whole workspace and nothing else, every `COPY` has its
//! source, and the user is a number. `deploy/image/build.sh` builds and starts one for real.

#![allow(clippy::unwrap_used)]

#[path = "image/context.rs"]
mod context;
#[path = "image/dockerfile.rs"]
mod dockerfile;

use std::{
    collections::BTreeSet,
    fs,
    path::{Component, Path, PathBuf},
    process::Command,
};

use context::{Rules, context};
use dockerfile::Dockerfile;
use serde_json::Value;

/// More than this is no source: the bundled models are 22 MB, the code below 4.
const MOST_BYTES: u64 = 32_000_000;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(file: &str) -> String {
    fs::read_to_string(root().join(file)).unwrap()
}

fn rules() -> Rules {
    Rules::parse(&read(".dockerignore"))
}

/// What `docker build .` sends, without what this machine's builds and tests left beside the sources.
fn sent() -> BTreeSet<PathBuf> {
    context(root(), &rules())
}

/// Packages with their targets, except tests, which no image builds, as cargo reads them from a folder.
fn targets(workspace: &Path) -> BTreeSet<(String, String, String, PathBuf)> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1", "--manifest-path"])
        .arg(workspace.join("Cargo.toml"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut found = BTreeSet::new();
    for package in told["packages"].as_array().unwrap() {
        for target in package["targets"].as_array().unwrap() {
            let kind = target["kind"][0].as_str().unwrap();
            if kind != "test" {
                let text = |value: &Value| value.as_str().unwrap().to_owned();
                let source = PathBuf::from(target["src_path"].as_str().unwrap());
                let source = source.strip_prefix(workspace).unwrap().to_owned();
                found.insert((
                    text(&package["name"]),
                    kind.to_owned(),
                    text(&target["name"]),
                    source,
                ));
            }
        }
    }
    found
}

#[test]
fn the_context_is_the_workspace_that_cargo_reads() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().canonicalize().unwrap();
    for file in sent() {
        let copy = folder.join(&file);
        fs::create_dir_all(copy.parent().unwrap()).unwrap();
        fs::copy(root().join(&file), copy).unwrap();
    }
    // Cargo itself refuses a member without a manifest, and a `[[bench]]` or `[[example]]` without its source.
    assert_eq!(targets(&folder), targets(&root().canonicalize().unwrap()));
    assert!(folder.join("Cargo.lock").is_file(), "`--locked` wants Cargo.lock");
}

#[test]
fn all_that_sources_are_made_of_is_in_the_context() {
    let sent = sent();
    let mut modules = 0;
    let mut included = 0;
    for file in sent.iter().filter(|file| file.extension().is_some_and(|kind| kind == "rs")) {
        let text = fs::read_to_string(root().join(file)).unwrap();
        let folder = file.parent().unwrap();
        let lines: Vec<&str> = text.lines().collect();
        // One with a `#[path]` is where that says, which is looked for below.
        let placed = |i: usize| i > 0 && lines[i - 1].trim().starts_with("#[path = ");
        let own = (0..lines.len()).filter(|&i| !placed(i));
        for name in own.filter_map(|i| module(lines[i])) {
            let stem = file.file_stem().unwrap().to_str().unwrap();
            let beside = folder.join(name);
            let below = if ["mod", "lib", "main"].contains(&stem) {
                beside.clone()
            } else {
                folder.join(stem).join(name)
            };
            let candidates =
                [&beside, &below].map(|path| [path.with_extension("rs"), path.join("mod.rs")]);
            let there = candidates.as_flattened().iter().any(|path| sent.contains(path));
            assert!(there, "{}: `mod {name}` is not in the context", file.display());
            modules += 1;
        }
        for target in includes(&text) {
            let target = plain(&folder.join(target));
            assert!(
                sent.contains(&target),
                "{}: {} is not in the context",
                file.display(),
                target.display()
            );
            included += 1;
        }
    }
    assert!(
        modules > 100 && included > 10,
        "{modules} modules and {included} included files were found"
    );
    // Build scripts may read anything; there are none, so nothing else is read.
    for (package, kind, ..) in targets(&root().canonicalize().unwrap()) {
        assert_ne!(kind, "custom-build", "{package}: say here what its build script reads");
    }
}

/// The name in `mod name;`.
fn module(line: &str) -> Option<&str> {
    let line = line.trim();
    let line = line
        .strip_prefix("pub ")
        .or_else(|| Some(line.split_once("pub(")?.1.split_once(") ")?.1))
        .unwrap_or(line);
    line.strip_prefix("mod ")?.strip_suffix(';')
}

/// The arguments of `include_str!`, `include_bytes!` and `include!`, and of `#[path]`.
fn includes(text: &str) -> impl Iterator<Item = &str> {
    ["include_str!(\"", "include_bytes!(\"", "include!(\"", "#[path = \""].into_iter().flat_map(
        move |before| text.split(before).skip(1).map(|rest| rest.split_once('"').unwrap().0),
    )
}

/// The path without `..`.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => assert!(plain.pop(), "{} leaves the workspace", path.display()),
            other => plain.push(other),
        }
    }
    plain
}

#[test]
fn nothing_large_or_secret_is_in_the_context() {
    let bytes: u64 = sent().iter().map(|file| fs::metadata(root().join(file)).unwrap().len()).sum();
    assert!(bytes < MOST_BYTES, "{bytes} bytes would be sent");

    let rules = rules();
    for path in [
        ".git/config",
        ".env",
        ".netrc",
        ".cargo/credentials.toml",
        ".ci/run",
        "src/.env",
        "models/.env.local",
        "distill/.git/config",
        "models/zoo/.huggingface/token",
        "benches/.venv/bin/python",
        "id_rsa",
        "server.key",
        "src/http/server.key",
        "deploy/server.pem",
        "models/zoo/server.pem",
        "target/release/understudy",
        "distill/target/debug/deps/lib.rlib",
        "models/src/target/x",
        "my-models/student/training/checkpoint.safetensors",
        "data/train.tar",
        "benches/peers/__pycache__/run.pyc",
        "benches/gpu/results/run.jsonl",
        "models/tests/golden/unet/adm.safetensors",
        "tests/browser/node_modules/playwright/index.js",
        "tests/http/main.rs",
        "docs/capacity.svg",
        "shared/notes.md",
    ] {
        assert!(rules.ignored(path), "{path} would be sent");
    }
}

#[test]
fn every_copy_has_its_source() {
    let dockerfile = Dockerfile::parse(&read("Dockerfile"));
    let sent = sent();
    let stages: Vec<&str> = dockerfile.stages().filter_map(|stage| stage.name).collect();
    let mut from_context = 0;
    for copy in dockerfile.copies() {
        if let Some(stage) = copy.from {
            assert!(stages.contains(&stage), "COPY --from={stage}: no such stage");
            continue;
        }
        for source in copy.sources {
            let source = plain(
                Path::new(source.trim_start_matches('/'))
                    .strip_prefix(".")
                    .unwrap_or(Path::new(source)),
            );
            assert!(
                sent.iter().any(|file| file.starts_with(&source)),
                "COPY {}: not in the context",
                source.display()
            );
            from_context += 1;
        }
    }
    assert!(from_context >= 2, "the sources and the bundled models are copied");
    // The bundled models lie whole beside the program.
    let zoo = root().join("models/zoo");
    for file in context(&zoo, &Rules::parse("")) {
        assert!(
            sent.contains(&Path::new("models/zoo").join(&file)),
            "models/zoo/{} is missing",
            file.display()
        );
    }
}

#[test]
fn the_user_is_a_number() {
    let dockerfile = Dockerfile::parse(&read("Dockerfile"));
    let last = dockerfile.stages().last().unwrap();
    let user = last
        .instructions
        .iter()
        .rfind(|(keyword, _)| keyword == "USER")
        .map(|(_, user)| user.as_str());
    let (uid, gid) = user.expect("USER").split_once(':').expect("user and group");
    for id in [uid, gid] {
        assert!(id.parse::<u32>().is_ok_and(|id| id > 0), "USER {id}: not a number above 0");
    }
}

#[test]
fn both_variants_stand_on_what_the_readme_asks_for() {
    let dockerfile = Dockerfile::parse(&read("Dockerfile"));
    assert!(read("docs/gpu.md").contains("CUDA 13 with `nvcc`, and cuDNN 9"));
    for (variant, part) in [("cpu", None), ("cuda", Some(["devel", "runtime"]))] {
        for (index, stage) in ["build", "run"].into_iter().enumerate() {
            let image = dockerfile.image(&format!("{stage}-{variant}"));
            match part {
                None => assert_eq!(image, "debian:bookworm-slim"),
                Some(parts) => {
                    // NVIDIA's images of CUDA 13 with `cudnn` in their names have cuDNN 9.
                    assert!(image.starts_with("nvidia/cuda:13."), "{image}");
                    assert!(image.contains(&format!("-cudnn-{}-", parts[index])), "{image}");
                }
            }
        }
    }
    // Both run on one distribution's libc at least as new as the one they are built with.
    let toolchain = read("rust-toolchain.toml");
    let version = toolchain.split('"').nth(1).unwrap();
    assert_eq!(dockerfile.image("rust"), format!("rust:{version}-slim-bookworm"));
}
