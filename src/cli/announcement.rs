//! What a server says on standard output as it starts: where it is at once, each model as it becomes ready, and then a
//! command to paste.

use std::net::SocketAddr;

use crate::registry::State;

/// Where the server is, what it runs on, and what it is about to load.
pub(super) fn opening(
    address: SocketAddr,
    device: &str,
    threads: usize,
    kept: &str,
    models: usize,
) -> String {
    let models = match models {
        1 => "1 model".to_owned(),
        models => format!("{models} models"),
    };
    format!(
        "Understudy serves on http://{address}   (API: http://{address}/docs/)
  device   {device}, {threads} threads
  data     {kept}
  loading  {models}"
    )
}

/// What became of a model.
pub(super) fn model(id: &str, state: &State) -> String {
    match state {
        State::Ready(model) => format!(
            "  model    {id}: ready, {}x{}, {:.1} million weights, {}",
            model.image[2],
            model.image[1],
            model.parameters as f64 / 1e6,
            model.dtype
        ),
        State::Failed(problem) => format!("  model    {id}: not ready: {problem}"),
        State::Loading(_) | State::Unloaded => format!("  model    {id}: not ready"),
    }
}

/// All models have been tried: who is asked by default, and one line to paste.
pub(super) fn ready(
    address: SocketAddr,
    default_model: &str,
    seconds: f64,
    wants_key: bool,
) -> String {
    let reachable = match address {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => format!("127.0.0.1:{}", v4.port()),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => format!("[::1]:{}", v6.port()),
        address => address.to_string(),
    };
    let key = if wants_key { " -H 'Authorization: Bearer KEY'" } else { "" };
    format!(
        "Ready after {seconds:.1} s. {default_model} answers requests that name no model. An image:

  curl -s http://{reachable}/v1/images/generations -H 'Content-Type: application/json' -H 'Accept: image/png'{key} -d '{{\"seed\": 1}}' -o image.png
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_to_paste_reaches_a_server_that_listens_everywhere() {
        for (listens, reaches) in [
            ("0.0.0.0:80", "http://127.0.0.1:80/"),
            ("[::]:80", "http://[::1]:80/"),
            ("10.0.0.7:80", "http://10.0.0.7:80/"),
        ] {
            let address = listens.parse().expect("an address");
            let said = ready(address, "teacher", 1.0, false);
            assert!(said.contains(reaches), "{said}");
            assert!(!said.contains("Bearer"));
            assert!(ready(address, "teacher", 1.0, true).contains("Bearer KEY"));
        }
    }
}
