//! Recipes: stages one after the other, what wins over what, and what is refused with its line.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use understudy_models::checkpoint::ModelFolder;

use crate::{Home, curve, weights};

/// Two stages: a student by DKDM, and from it one of 2 evaluations.
const RECIPE: &str = r#"
teacher = "teacher"
batch = 4
rho = 0.2
walk-steps = 10
checkpoint-every = 10
sample-every = 0
no-report = true
learning-rate-schedule = "constant"

[[stage]]
name = "first"
student = "student.json"
steps = 30

[[stage]]
name = "second"
evaluations = 2
steps = 40
seed = 3
"#;

impl Home {
    fn recipe(&self, out: &str, more: &[&str]) -> Command {
        fs::write(self.path("recipe.toml"), RECIPE).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_understudy"));
        // Not the recipe's folder: what it names is found beside it all the same.
        command.current_dir(env!("CARGO_MANIFEST_DIR")).args(["distill", "--threads", "1"]);
        command.arg("--config").arg(self.path("recipe.toml")).arg("--out").arg(self.path(out));
        command.args(more);
        command
    }
}

fn said(output: &Output) -> String {
    let text = [&output.stdout[..], b"\n", &output.stderr[..]].concat();
    String::from_utf8_lossy(&text).into_owned()
}

#[test]
fn stages_are_the_runs_that_their_flags_would_be() {
    let home = Home::new();
    let ran = home.recipe("out", &[]).output().unwrap();
    assert!(ran.status.success(), "{}", said(&ran));
    assert!(said(&ran).contains("Stage 2 of 2: second"), "{}", said(&ran));

    let mut first = home.arguments("student.json", "first", 30);
    first.extend(["--rho".into(), "0.2".into()]);
    let mut second = home.few("first", "second", 2, 40);
    second.push("--seed=3".into());
    for arguments in [first, second] {
        let ran = Command::new(env!("CARGO_BIN_EXE_understudy")).args(arguments).output().unwrap();
        assert!(ran.status.success(), "{}", said(&ran));
    }
    for name in ["first", "second"] {
        let (staged, alone) = (home.path("out").join(name), home.path(name));
        assert_eq!(curve(&staged), curve(&alone), "{name}");
        assert_eq!(weights(&staged), weights(&alone), "{name}");
    }
    let card = ModelFolder::open(&home.path("out/second")).unwrap().card;
    assert_eq!(card.recipe["initialisation"], "weights of first");
    assert_eq!(card.recipe["seed"], 3);

    // Done, it is left as it is.
    let before =
        fs::metadata(home.path("out/second/model_index.json")).unwrap().modified().unwrap();
    let again = home.recipe("out", &[]).output().unwrap();
    assert!(again.status.success(), "{}", said(&again));
    assert_eq!(said(&again).matches("It is done already").count(), 2, "{}", said(&again));
    let after = fs::metadata(home.path("out/second/model_index.json")).unwrap().modified().unwrap();
    assert_eq!(after, before);
    // Another recipe is not taken for it.
    let other = home.recipe("out", &["--seed", "9"]).output().unwrap();
    let told = said(&other);
    assert!(
        !other.status.success() && told.contains("another run") && told.contains("stage first"),
        "{told}"
    );
}

#[test]
fn killed_in_a_later_stage_it_goes_on_there() {
    let home = Home::new();
    assert!(home.recipe("whole", &[]).output().unwrap().status.success());
    let mut process =
        home.recipe("killed", &[]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    while curve(&home.path("killed/second")).len() < 15 {
        assert!(process.try_wait().unwrap().is_none(), "it ended before it could be killed");
        std::thread::yield_now();
    }
    process.kill().unwrap();
    process.wait().unwrap();
    assert!(!home.path("killed/second/model_index.json").exists());
    let resumed = home.recipe("killed", &[]).output().unwrap();
    let told = said(&resumed);
    assert!(resumed.status.success(), "{told}");
    assert_eq!(told.matches("It is done already").count(), 1, "{told}");
    for name in ["first", "second"] {
        let [whole, killed] = ["whole", "killed"].map(|out| home.path(out).join(name));
        assert_eq!(curve(&whole), curve(&killed), "{name}");
        assert_eq!(weights(&whole), weights(&killed), "{name}");
    }
}

#[test]
fn what_is_given_on_the_command_line_wins() {
    let home = Home::new();
    let ran = home.recipe("out", &["--steps", "2", "--batch", "2", "--seed=5"]).output().unwrap();
    assert!(ran.status.success(), "{}", said(&ran));
    for name in ["first", "second"] {
        let recipe = ModelFolder::open(&home.path("out").join(name)).unwrap().card.recipe;
        let got = ["student_steps", "batch", "seed"].map(|field| recipe[field].as_u64().unwrap());
        assert_eq!(got, [2, 2, 5], "{name}");
    }
    for flag in ["--student=x", "--init=random", "--evaluations=2"] {
        let refused = home.recipe("other", &[flag]).output().unwrap();
        let told = said(&refused);
        assert_eq!(refused.status.code(), Some(2), "{told}");
        assert!(told.contains("belongs to one stage, and") && told.contains("has 2"), "{told}");
    }
    assert!(!home.path("other").exists());
}

#[test]
fn a_dry_run_estimates_all_stages_and_writes_nothing() {
    let home = Home::new();
    let ran = home.recipe("out", &["--dry-run"]).output().unwrap();
    let told = said(&ran);
    assert!(ran.status.success(), "{told}");
    assert_eq!(told.matches("  In all").count(), 2, "{told}");
    assert!(told.contains("All 2 stages: ") && told.contains("Nothing was written"), "{told}");
    assert!(!home.path("out").exists(), "{told}");
    // What is done already is not estimated.
    assert!(home.recipe("out", &["--steps", "1"]).output().unwrap().status.success());
    let again = home.recipe("out", &["--steps", "1", "--dry-run"]).output().unwrap();
    let told = said(&again);
    assert_eq!(told.matches("It is done already").count(), 2, "{told}");
    assert!(told.contains("All 2 stages: 0 seconds."), "{told}");
}

fn recipes(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|it| it == "toml")).collect()
}

/// A recipe as it is read beside the home's models: it says what it would do, or why not.
fn tried(home: &Home, recipe: &Path, more: &[&str]) -> Output {
    let here = home.path(&recipe.file_name().unwrap().to_string_lossy());
    fs::copy(recipe, &here).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_understudy"));
    command.args(["distill", "--dry-run", "--config"]).arg(here).args(more);
    command.args(["--out", &home.path("out").display().to_string()]);
    command.args(["--teacher", &home.path("teacher").display().to_string()]);
    command.output().unwrap()
}

#[test]
fn what_is_wrong_in_a_recipe_is_told_with_its_line() {
    let (home, bad) = (Home::new(), recipes("tests/recipes/bad"));
    assert!(bad.len() >= 20, "{}", bad.len());
    for recipe in bad {
        let text = fs::read_to_string(&recipe).unwrap();
        let refused = text.lines().find_map(|line| line.strip_prefix("# refused: ")).unwrap();
        let name = recipe.file_name().unwrap().to_string_lossy().into_owned();
        let output = tried(&home, &recipe, &[]);
        let told = said(&output);
        assert!(!output.status.success(), "{name}: {told}");
        assert!(told.contains(&format!("{name}:{refused}")), "{name}: {told}");
        assert!(!told.contains("panicked"), "{name}: {told}");
    }
    let missing = tried(&home, &recipes("tests/recipes/good")[0], &["--config=none.toml"]);
    assert!(!missing.status.success() && said(&missing).contains("--config"), "{}", said(&missing));
    assert!(!home.path("out").exists());
}

#[test]
fn committed_recipes_are_read_and_the_schema_is_what_the_flags_are() {
    let schema =
        Command::new(env!("CARGO_BIN_EXE_understudy")).arg("recipe-schema").output().unwrap();
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/recipe.schema.json");
    assert!(
        String::from_utf8_lossy(&schema.stdout) == fs::read_to_string(committed).unwrap(),
        "the flags changed: cargo run -- recipe-schema > configs/recipe.schema.json"
    );
    let home = Home::new();
    let read = [recipes("configs"), recipes("tests/recipes/good")].concat();
    assert!(read.len() >= 4);
    for recipe in read {
        // Read as a whole, and then refused for a device that is not there.
        let output = Command::new(env!("CARGO_BIN_EXE_understudy"))
            .args(["distill", "--dry-run", "--device=abacus", "--config"])
            .arg(&recipe)
            .args(["--out", &home.path("out").display().to_string()])
            .output()
            .unwrap();
        let told = said(&output);
        assert!(told.contains("--device abacus"), "{}: {told}", recipe.display());
    }
}
