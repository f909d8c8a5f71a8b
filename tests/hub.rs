//! A Hub model as the default model of a whole server.
#![allow(clippy::unwrap_used)]

#[allow(dead_code)] // the tests of `models` use the rest
#[path = "../models/tests/hub_server/mod.rs"]
mod hub_server;

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::Path,
    process::{Child, Command, Stdio},
};

use hub_server::HubServer;
use serde_json::Value;

/// Ends the server with the test.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts it and waits until it is ready.
fn serve(arguments: &[&str], hub: &HubServer, home: &Path) -> (Server, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_understudy"))
        .args(["serve", "--port", "0"])
        .args(arguments)
        .env("HF_ENDPOINT", &hub.endpoint)
        .env("HF_HOME", home)
        .env("XDG_STATE_HOME", home)
        .env("XDG_CACHE_HOME", home)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let stdout = child.stdout.take().unwrap();
    let server = Server(child);
    let lines = BufReader::new(stdout).lines().map_while(Result::ok);
    let said: Vec<String> = lines.take_while(|line| !line.starts_with("Ready after")).collect();
    let (_, address) = said[0].split_once("http://").expect("the server prints its address");
    (server, address.split(' ').next().unwrap().to_owned())
}

fn models(address: &str) -> Value {
    let mut stream = TcpStream::connect(address).unwrap();
    let request =
        format!("GET /v1/models HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    serde_json::from_str(reply.split_once("\r\n\r\n").unwrap().1).unwrap()
}

#[test]
fn hub_model_is_downloaded_and_serves_as_the_default_beside_the_others() {
    let zoo = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/zoo");
    let teacher = zoo.join("fashion-mnist-teacher");
    let files = [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
    ];
    let files = files.map(|name| (name.to_owned(), fs::read(teacher.join(name)).unwrap()));
    let hub = HubServer::new("somebody/clothes", files.into());
    let home = tempfile::TempDir::new().unwrap();
    let arguments = ["--models", zoo.to_str().unwrap(), "--default-model", "somebody/clothes"];
    let (_server, address) = serve(&arguments, &hub, home.path());
    let models = models(&address);
    let ids: Vec<_> = models["data"].as_array().unwrap().iter().map(|m| &m["id"]).collect();
    assert_eq!(ids[0], "somebody--clothes", "{models}");
    assert!(ids.iter().any(|id| *id == "fashion-mnist-teacher"), "{models}");
}
