//! `understudy health`: the health check of an image that has neither shell nor curl.

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, TcpStream},
    time::Duration,
};

use super::port;

/// Longer, and the server is not well.
const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Debug, clap::Args)]
pub(super) struct HealthArgs {
    /// The server's port on this machine.
    #[arg(
        long,
        env = "UNDERSTUDY_PORT",
        default_value_t = port::DEFAULT,
        value_parser = port::parse
    )]
    port: u16,
    /// A key, where health asks for one.
    #[arg(
        long,
        env = "UNDERSTUDY_API_KEY",
        value_name = "KEY",
        value_delimiter = ',',
        hide_env_values = true
    )]
    api_key: Vec<String>,
}

/// Runs the command.
///
/// # Errors
/// What the server answers instead of 200, or why it does not.
pub(super) fn run(arguments: &HealthArgs) -> Result<(), String> {
    let url = format!("http://127.0.0.1:{}/health", arguments.port);
    let reply = ask(arguments).map_err(|error| format!("{url}: {error}"))?;
    let status = reply.lines().next().unwrap_or_default();
    if status.split(' ').nth(1) == Some("200") { Ok(()) } else { Err(format!("{url}: {status}")) }
}

fn ask(arguments: &HealthArgs) -> io::Result<String> {
    let mut stream =
        TcpStream::connect_timeout(&(Ipv4Addr::LOCALHOST, arguments.port).into(), PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    // Trimmed as the server trims them.
    let key = arguments.api_key.first().map(|key| key.trim());
    let key = key.map(|key| format!("Authorization: Bearer {key}\r\n")).unwrap_or_default();
    let request =
        format!("GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n{key}Connection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply)?;
    Ok(reply)
}
