//! The program as a process.

use std::process::{Command, Output};

/// What it answers to arguments, with variables of the environment; it keeps nothing where a user's things are.
pub(crate) fn understudy(arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_understudy"));
    command.args(arguments).current_dir(env!("CARGO_MANIFEST_DIR"));
    for folder in ["XDG_STATE_HOME", "XDG_CACHE_HOME"] {
        command.env(folder, env!("CARGO_TARGET_TMPDIR"));
    }
    command.envs(variables.iter().copied()).output().unwrap()
}

/// The standard output of one that did what it was to do.
pub(crate) fn done(output: Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    String::from_utf8(output.stdout).unwrap()
}

/// The standard error of one that refused, with a code.
pub(crate) fn refused(output: &Output, code: i32) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(said.contains("error: ") && !said.contains("panicked"), "{said}");
    said
}
