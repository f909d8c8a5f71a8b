//! The binary from outside: what it says when it cannot, and when nobody takes what it says.
#![allow(clippy::unwrap_used)]

use std::{
    io::{BufRead, BufReader},
    net::TcpListener,
    process::{Command, Output, Stdio},
};

fn understudy(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_understudy"));
    command.args(arguments).current_dir(env!("CARGO_MANIFEST_DIR"));
    // Not the experiments of whoever runs the tests.
    for folder in ["XDG_STATE_HOME", "XDG_CACHE_HOME"] {
        command.env(folder, env!("CARGO_TARGET_TMPDIR"));
    }
    command
}

/// What a run that must fail says: one screen, no panic.
fn failure(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.starts_with("error: ") && !said.contains("panicked"), "{said}");
    said
}

#[test]
fn a_port_in_use_is_told_with_the_way_out() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let said = failure(&understudy(&["serve", "--port", &port]).output().unwrap());
    assert!(said.contains(&port) && said.contains("--port 0"), "{said}");
}

#[test]
fn a_training_that_was_started_several_times_at_once_writes_nothing() {
    let out = tempfile::tempdir().unwrap();
    let folder = out.path().join("student");
    let out = ["--out", folder.to_str().unwrap()];
    let distill = ["distill", "--teacher", "fashion-mnist-teacher", "--student", "tiny"];
    let config = "configs/fashion-mnist-unet.json";
    let train = ["train", "--data", "nothing", "--config", config];
    for command in [&distill[..], &train] {
        let mut command = understudy(&[command, &out].concat());
        let output = command.env("OMPI_COMM_WORLD_SIZE", "4").output().unwrap();
        let said = failure(&output);
        assert!(said.contains("OMPI_COMM_WORLD_SIZE is 4") && said.contains("-n 1"), "{said}");
        assert!(!folder.exists());
    }
}

#[test]
fn keys_that_protect_nothing_are_refused() {
    for arguments in [
        &["--api-key", "a,,b"][..],
        &["--api-key", " \n"],
        &["--admin-key", ""],
        &["--api-key", "a", "--admin-key", "a \n"],
    ] {
        let said = failure(&understudy(&[&["serve"], arguments].concat()).output().unwrap());
        assert!(said.contains("-key"), "{said}");
    }
    let mut from_environment = understudy(&["serve"]);
    let said = failure(&from_environment.env("UNDERSTUDY_API_KEY", "").output().unwrap());
    assert!(said.contains("--api-key"), "{said}");
}

#[test]
fn whom_a_server_without_keys_lets_in_is_told_at_the_start() {
    let warnings = |arguments: &[&str]| {
        let serve = ["serve", "--port", "0", "--max-batch", "1"];
        let mut command = understudy(&[&serve, arguments].concat());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let ready = stdout.lines().map_while(Result::ok).any(|line| line.starts_with("Ready"));
        child.kill().unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(ready);
        String::from_utf8(output.stderr).unwrap()
    };
    let warned = warnings(&["--host", "0.0.0.0"]);
    assert!(warned.contains("WARN") && warned.contains("--api-key"), "{warned}");
    assert!(!warnings(&["--host", "0.0.0.0", "--api-key", "a"]).contains("WARN"));
    assert!(!warnings(&[]).contains("WARN"));
}

#[test]
fn a_model_that_is_not_there_is_told_with_the_places() {
    let output = understudy(&["sample", "--model", "nope", "--out", "x.png"]).output().unwrap();
    let said = failure(&output);
    assert!(said.contains("\"nope\"") && said.contains("models/zoo"), "{said}");
}

#[cfg(target_os = "linux")]
mod full_disk {
    use std::{
        fs::{File, OpenOptions},
        io::{Read, Write},
        net::TcpStream,
    };

    use super::*;

    fn full() -> File {
        OpenOptions::new().write(true).open("/dev/full").unwrap()
    }

    #[test]
    fn behind_standard_output_is_an_error() {
        let said = failure(&understudy(&["openapi"]).stdout(full()).output().unwrap());
        assert!(said.contains("standard output"), "{said}");
    }

    #[test]
    fn behind_the_log_does_not_stop_the_server() {
        let mut child = understudy(&["serve", "--port", "0"])
            .stdout(Stdio::piped())
            .stderr(full())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let address = lines
            .find_map(|line| Some(line.split_once("http://")?.1.split(' ').next()?.to_owned()));
        let ask = || -> std::io::Result<String> {
            let mut stream = TcpStream::connect(address.as_deref().unwrap_or_default())?;
            stream.write_all(
                b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
            )?;
            let mut reply = String::new();
            stream.read_to_string(&mut reply)?;
            Ok(reply)
        };
        // Every answer is a line in the log.
        let replies = [ask(), ask()];
        child.kill().unwrap();
        child.wait().unwrap();
        for reply in replies {
            assert!(reply.as_ref().is_ok_and(|r| r.starts_with("HTTP/1.1 200")), "{reply:?}");
        }
    }
}

#[test]
fn every_command_that_help_shows_has_a_manual_page() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path().join("share/man1");
    let ran = understudy(&["man"]).arg(&folder).output().unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let help = understudy(&["--help"]).output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let commands = commands.take_while(|line| !line.is_empty());
    // Lines that are indented further go on with a description.
    let commands = commands.filter_map(|line| line.strip_prefix("  "));
    let commands = commands.filter(|line| !line.starts_with(' '));
    let commands: Vec<_> = commands.map(|line| line.split(' ').next().unwrap()).collect();
    assert!(commands.contains(&"serve") && commands.len() > 8, "{help}");
    for command in commands.iter().filter(|command| **command != "help") {
        let page = folder.join(format!("understudy-{command}.1"));
        let page = std::fs::read_to_string(&page).unwrap_or_else(|_| panic!("{}", page.display()));
        assert!(page.contains(".SH SYNOPSIS"), "{page}");
    }
    assert!(std::fs::read_to_string(folder.join("understudy.1")).unwrap().contains("distill"));
    // A file is no folder.
    let refused = failure(&understudy(&["man"]).arg(folder.join("understudy.1")).output().unwrap());
    assert!(refused.contains("name another folder"), "{refused}");
}

/// As a package lays it out: the program in PREFIX/bin, its models in PREFIX/share.
#[cfg(unix)]
#[test]
fn an_installed_program_has_the_models_of_its_package() {
    let prefix = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let [program, zoo] =
        ["bin/understudy", "share/understudy/models/zoo"].map(|it| prefix.path().join(it));
    for folder in [program.parent().unwrap(), zoo.as_path()] {
        std::fs::create_dir_all(folder).unwrap();
    }
    std::fs::hard_link(env!("CARGO_BIN_EXE_understudy"), &program).unwrap();
    let student =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/zoo/fashion-mnist-student");
    std::os::unix::fs::symlink(student, zoo.join("installed")).unwrap();
    let listed = Command::new(&program)
        .args(["models", "--json"])
        .current_dir(prefix.path())
        .output()
        .unwrap();
    let listed: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap();
    let ids: Vec<_> =
        listed.as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["installed"]);
    assert!(
        listed[0]["folder"].as_str().unwrap().contains("share/understudy/models/zoo"),
        "{listed}"
    );
}

#[test]
fn the_layers_of_a_text_to_image_model_are_timed() {
    for model in ["emoji-text-to-image", "emoji-text-to-image-student-4"] {
        let bench =
            ["bench", "--model", model, "--profile", "--seconds", "0", "--steps", "1", "--json"];
        let output = understudy(&bench).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        let told: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let layers = told["profile"]["kernels"].as_array().unwrap();
        assert!(
            layers.iter().any(|layer| layer["name"].as_str().unwrap().starts_with("attend")),
            "{told}"
        );
    }
}
