//! `understudy quantize` as a process, and what `--dtype int8` serves.
#![allow(clippy::unwrap_used)]

#[path = "common/program.rs"]
mod program;

use std::{fs, path::Path, process::Output};

use understudy_models::{checkpoint::ModelFolder, kernels::Isa, quantization::FILE};

fn understudy(arguments: &[&str]) -> Output {
    // Loops, where the processor has no instruction.
    let portable = !Isa::detect().multiplies_int8();
    program::understudy(arguments, if portable { &[("UNDERSTUDY_ISA", "portable")] } else { &[] })
}

fn done(arguments: &[&str]) -> String {
    program::done(understudy(arguments))
}

fn refused(arguments: &[&str]) -> String {
    program::refused(&understudy(arguments), 1)
}

#[test]
fn a_quantised_model_is_a_folder_that_is_sampled_and_measured_in_8_bits() {
    let home = tempfile::tempdir().unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let model = text(&home.path().join("model"));
    let quantize = ["quantize", "--rows", "32", "--steps", "4", "--out", &model, "--model"];
    let said = done(&[&quantize[..], &["fashion-mnist-teacher"]].concat());
    assert!(said.contains("layers of 8 bits") && said.contains("--dtype int8"), "{said}");

    // Codes and scales are the small part of it, and the card tells how they were had.
    let folder = ModelFolder::open(Path::new(&model)).unwrap();
    let codes = fs::metadata(Path::new(&model).join("unet").join(FILE)).unwrap().len();
    let weights = fs::metadata(&folder.weight_files().unwrap()[0]).unwrap().len();
    assert!(codes < weights / 3, "{codes} of {weights} bytes");
    assert_eq!(folder.card.recipe["quantization"]["rows"], 32);
    assert!(folder.card.scores.is_empty());
    assert_eq!(folder.quantization().unwrap().unwrap().starts.len(), 3);

    // The same images alone and together; in f32 nearly the same.
    let draw = |name: &str, more: &[&str]| {
        let out = home.path().join(name);
        let own = ["sample", "--model", &model, "--n", "3", "--steps", "4", "--out", &text(&out)];
        done(&[&own[..], more].concat());
        let mut files: Vec<_> = fs::read_dir(&out).unwrap().map(|it| it.unwrap().path()).collect();
        files.sort();
        files.into_iter().map(|file| fs::read(file).unwrap()).collect::<Vec<_>>()
    };
    let together = draw("together", &["--dtype", "int8"]);
    assert!(together == draw("alone", &["--dtype", "int8", "--batch", "1"]));
    assert!(together != draw("f32", &[]));

    let bench = ["bench", "--model", &model, "--seconds", "0", "--steps", "1", "--json"];
    let told: serde_json::Value =
        serde_json::from_str(&done(&[&bench[..], &["--dtype", "int8"]].concat())).unwrap();
    assert_eq!(told["dtype"], "int8", "{told}");

    // Nothing is left of what is refused.
    let other = text(&home.path().join("other"));
    let said = refused(&["quantize", "--model", &model, "--out", &other]);
    assert!(said.contains("quantised already"), "{said}");
    let said = refused(&[&quantize[..], &["fashion-mnist-teacher"]].concat());
    assert!(said.contains("--out") && said.contains("exists"), "{said}");
    let said = refused(&["quantize", "--model", "emoji-text-to-image", "--out", &other]);
    assert!(said.contains("text-to-image"), "{said}");
    assert!(!Path::new(&other).exists());
}

#[test]
fn a_model_that_is_not_quantised_is_refused_with_the_remedy() {
    let home = tempfile::tempdir().unwrap();
    let out = home.path().join("images");
    let said = refused(&[
        "sample",
        "--model",
        "fashion-mnist-student",
        "--dtype",
        "int8",
        "--out",
        out.to_str().unwrap(),
    ]);
    assert!(said.contains("int8") && said.contains("understudy quantize"), "{said}");
    assert!(!out.exists());
}
