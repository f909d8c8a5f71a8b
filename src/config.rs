//! What the operator asked for, checked once and trusted from then on.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use understudy_models::checkpoint::Lora;

use crate::{
    cli::{LogFormat, ServeArgs},
    experiments::Experiments,
    http,
    registry::{self, KeptCosts},
    traces,
};

/// A valid configuration of `serve`.
#[derive(Debug, Clone)]
pub struct Config {
    /// Address to listen on.
    pub host: String,
    /// Port to listen on; 0 for any free one.
    pub port: u16,
    /// Images that may wait or run at a time.
    pub max_queue: usize,
    /// Where and how models are loaded.
    pub registry: registry::Settings,
    /// Where experiments and votes are kept.
    pub data: Data,
    /// The settings of HTTP.
    pub http: http::Settings,
    /// How long a shutdown may take.
    pub shutdown: http::Shutdown,
    /// How log lines are written.
    pub log_format: LogFormat,
    /// Where traces go, if anywhere.
    pub traces: Option<traces::Settings>,
}

impl Config {
    /// Checks the arguments.
    ///
    /// # Errors
    /// A sentence that names the flag, its value and the remedy.
    pub fn new(arguments: ServeArgs) -> Result<Self, String> {
        let devices = arguments.compute.devices()?;
        let api_keys = keys("--api-key", &arguments.api_key)?;
        let admin_keys = keys("--admin-key", &arguments.admin_key)?;
        if admin_keys.iter().any(|key| api_keys.contains(key)) {
            return Err("--admin-key: one of its keys is an --api-key, too; whoever has that could load and unload models, so choose another".into());
        }
        let origins = arguments.cors_allow_origin.iter().map(|origin| check_origin(origin.trim()));
        let hosts = arguments.allowed_host.iter().map(|host| allowed_host(host));
        let max_queue = arguments.max_queue;
        let largest_body = http::Settings::largest_body(arguments.body_budget_bytes);
        if arguments.max_body_bytes > largest_body {
            return Err(format!(
                "--max-body-bytes {}: one body may take half of --body-budget-bytes {} and is counted three times, which leaves {largest_body}; lower one or raise the other",
                arguments.max_body_bytes, arguments.body_budget_bytes
            ));
        }
        Ok(Self {
            host: arguments.host,
            port: arguments.port,
            max_queue,
            registry: registry::Settings {
                folders: arguments.models.folders_and(arguments.model),
                default_model: arguments.default_model,
                dtype: arguments.compute.dtype(&devices[0])?,
                devices,
                max_rows: arguments.max_batch,
                deterministic: arguments.deterministic,
                idle_encoder: arguments.idle_encoder_seconds.map(Duration::from_secs),
                kept_costs: user_folder("XDG_CACHE_HOME", ".cache")
                    .map_or_else(KeptCosts::default, |caches| {
                        KeptCosts::in_folder(caches.join("evaluation-costs"))
                    }),
            },
            data: match (arguments.database_url, arguments.data_dir) {
                (Some(url), _) => Data::Shared(Box::new(
                    Experiments::address(&url)
                        .map_err(|problem| format!("--database-url: {problem}"))?,
                )),
                (None, Some(folder)) => Data::Named(folder),
                (None, None) => Data::Default(user_folder("XDG_STATE_HOME", ".local/state")),
            },
            http: http::Settings {
                max_pixels: arguments.max_pixels,
                max_images: arguments.max_images_per_request.min(max_queue),
                max_rows: max_queue,
                request_timeout: Duration::from_secs(arguments.request_timeout_seconds),
                max_body_bytes: arguments.max_body_bytes,
                body_budget_bytes: arguments.body_budget_bytes,
                max_connections: http::most_connections(arguments.max_connections)?,
                head_timeout: Duration::from_secs(arguments.head_timeout_seconds),
                body_timeout: Duration::from_secs(arguments.body_timeout_seconds),
                idle_timeout: Duration::from_secs(arguments.idle_timeout_seconds),
                api_keys,
                admin_keys,
                api_key_everywhere: arguments.api_key_everywhere,
                cors_allow_origin: origins.collect::<Result<_, _>>()?,
                // Known once it listens.
                loopback: false,
                private: false,
                allowed_hosts: hosts.collect::<Result<_, _>>()?,
                loras: loras(&arguments.lora)?,
                shadow_rate: shadow_rate(arguments.shadow_rate)?,
            },
            shutdown: http::Shutdown {
                delay: Duration::from_secs(arguments.shutdown_delay_seconds),
                drain: Duration::from_secs(arguments.drain_seconds),
            },
            log_format: arguments.log_format,
            traces: traces::Settings::of_environment()?,
        })
    }
}

/// LoRAs by the names that requests give them, read here so that what is none is refused at the start.
fn loras(named: &[(String, PathBuf)]) -> Result<BTreeMap<String, Lora>, String> {
    let mut loras = BTreeMap::new();
    for (name, file) in named {
        let lora = Lora::open(file, 1.0).map_err(|error| format!("--lora {name}: {error}"))?;
        if loras.insert(name.clone(), lora).is_some() {
            return Err(format!(
                "--lora {name}: is given twice; choose another name for one of them"
            ));
        }
    }
    Ok(loras)
}

/// Where what is kept over restarts is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Data {
    /// In a PostgreSQL database that servers share.
    Shared(Box<tokio_postgres::Config>),
    /// In a folder. The operator named it, so it must be usable.
    Named(PathBuf),
    /// In the folder where such things are kept for this user, if there is such a place. It is made when something is to
    /// be kept, and a server that cannot use it serves all the same.
    Default(Option<PathBuf>),
}

/// `understudy` in one of the user's folders: the one that the XDG base directory specification's variable names, else
/// its default below the home, on any system.
fn user_folder(variable: &str, default: &str) -> Option<PathBuf> {
    let named = std::env::var_os(variable).map(PathBuf::from);
    let named = named.filter(|folder| folder.is_absolute());
    let home = || Some(std::env::home_dir()?).filter(|home| home.is_absolute());
    let folder = named.or_else(|| Some(home()?.join(default)))?;
    Some(folder.join("understudy"))
}

fn shadow_rate(rate: f64) -> Result<f64, String> {
    if (0.0..=1.0).contains(&rate) {
        return Ok(rate);
    }
    Err(format!("--shadow-rate {rate}: a share, so write a number from 0 (none) to 1 (all)"))
}

/// Keys without the spaces and line ends around them, which files and shells add.
fn keys(flag: &str, keys: &[String]) -> Result<Vec<String>, String> {
    let trimmed = keys.iter().map(|key| match key.trim() {
        "" => Err(format!("{flag} {key:?}: a key may not be empty; leave the flag out for none")),
        key => Ok(key.to_owned()),
    });
    trimmed.collect()
}

fn allowed_host(host: &str) -> Result<http::Host, String> {
    host.trim().parse().map_err(|()| {
        format!(
            "--allowed-host {host:?}: not a host; write the name or address alone, as in pictures.example.org or [fd00::1], without scheme and port"
        )
    })
}

/// An origin is a scheme, a host and perhaps a port; browsers send no more.
fn check_origin(origin: &str) -> Result<String, String> {
    if origin.parse::<http::Origin>().is_ok() || origin == "*" {
        return Ok(origin.to_owned());
    }
    Err(format!(
        "--cors-allow-origin {origin}: not an origin; write scheme, host and port as in https://example.org:8443, or *"
    ))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_trimmed_and_never_empty() {
        let trimmed = |keys: &[&str]| {
            let keys: Vec<_> = keys.iter().map(|key| (*key).to_owned()).collect();
            super::keys("--api-key", &keys)
        };
        assert_eq!(trimmed(&["a", " b\n", "\tc d\r\n"]).unwrap(), ["a", "b", "c d"]);
        assert_eq!(trimmed(&[]).unwrap(), [""; 0]);
        for empty in [&[""][..], &["a", ""], &["a", " \n"]] {
            let problem = trimmed(empty).unwrap_err();
            assert!(problem.contains("--api-key") && problem.contains("empty"), "{problem}");
        }
    }

    #[test]
    fn hosts_and_origins_are_those_that_a_browser_can_send() {
        for host in ["pictures.example", "Pictures.Example.", "10.0.0.7", "[fd00::7]", " a "] {
            assert!(allowed_host(host).is_ok(), "{host}");
        }
        for host in ["", "https://a.example", "a.example:8080", "fd00::7", "a/b", "*", "a b"] {
            let problem = allowed_host(host).unwrap_err();
            assert!(problem.contains("--allowed-host"), "{problem}");
        }
        for origin in ["https://a.example", "http://a.example:8080", "http://[::1]:3000", "*"] {
            assert_eq!(check_origin(origin).unwrap(), origin);
        }
        for origin in ["", "a.example", "https://", "https://a.example/", "ftp://a", "null"] {
            let problem = check_origin(origin).unwrap_err();
            assert!(problem.contains("--cors-allow-origin"), "{problem}");
        }
    }

    /// Every flag of `serve` that takes a value, with numbers at and beyond the ends of all types.
    #[test]
    fn no_number_makes_a_flag_panic() {
        use clap::{Args, FromArgMatches};
        let command = || ServeArgs::augment_args(clap::Command::new("serve"));
        let takes_value = |flag: &clap::Arg| flag.get_action().takes_values();
        let flags: Vec<String> = command()
            .get_arguments()
            .filter(|flag| takes_value(flag))
            .filter_map(|flag| Some(format!("--{}", flag.get_long()?)))
            .collect();
        assert!(flags.len() >= 25, "{flags:?}");
        let numbers = [
            "0",
            "1",
            "-1",
            "255",
            "65535",
            "65536",
            "4294967295",
            "4294967296",
            "9223372036854775807",
            "18446744073709551615",
            "18446744073709551616",
            "1e308",
            "1e999",
            "NaN",
            "inf",
            "",
        ];
        let ends = |flag: &str, number: &str| {
            let matches = command().try_get_matches_from(["serve", flag, number]);
            let arguments = ServeArgs::from_arg_matches(&matches.ok()?).ok()?;
            Config::new(arguments).ok()
        };
        for flag in &flags {
            for number in numbers {
                let Some(config) = ends(flag, number) else { continue };
                // What was accepted can be added to a clock, and held.
                for time in [
                    config.shutdown.delay,
                    config.shutdown.drain,
                    config.http.request_timeout,
                    config.http.head_timeout,
                    config.http.body_timeout,
                    config.http.idle_timeout,
                ] {
                    assert!(time <= Duration::from_secs(86_400), "{flag} {number}");
                }
                assert!(config.max_queue <= 65_536, "{flag} {number}");
                assert!(config.http.max_images <= config.max_queue, "{flag} {number}");
                let largest = http::Settings::largest_body(config.http.body_budget_bytes);
                assert!(config.http.max_body_bytes <= largest, "{flag} {number}");
            }
        }
        for (flag, number) in [
            ("--drain-seconds", "18446744073709551615"),
            ("--request-timeout-seconds", "18446744073709551615"),
            ("--max-queue", "18446744073709551615"),
            ("--max-queue", "0"),
            ("--max-batch", "0"),
            ("--max-body-bytes", "9223372036854775807"),
            ("--threads", "65535"),
            ("--idle-timeout-seconds", "0"),
        ] {
            assert!(ends(flag, number).is_none(), "{flag} {number}");
        }
        for (flag, number) in [
            ("--drain-seconds", "0"),
            ("--drain-seconds", "86400"),
            ("--max-queue", "1"),
            ("--max-queue", "65536"),
            ("--max-images-per-request", "65536"),
            ("--request-timeout-seconds", "86400"),
            ("--body-budget-bytes", "1099511627776"),
            ("--max-connections", "1"),
        ] {
            assert!(ends(flag, number).is_some(), "{flag} {number}");
        }
    }
}
