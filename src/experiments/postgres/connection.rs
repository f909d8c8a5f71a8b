//! Connections to the database: made within a time, and what goes wrong told from what was wrong.

use std::time::Duration;

use tokio::time::timeout;
use tokio_postgres::{
    Client, Config, Connection, NoTls, Socket,
    config::{Host, SslMode},
    error::SqlState,
    tls::NoTlsStream,
};

use super::Error;

/// How long a connection may take. Votes wait meanwhile.
const CONNECTING: Duration = Duration::from_secs(3);

/// What a database does with a server that is gone without a word: its transaction ends, and with it the lock that others wait for.
const SESSION: &str =
    "SET idle_in_transaction_session_timeout = '10s'; SET statement_timeout = '10s'";

/// Which database an address names.
///
/// # Errors
/// What is wrong with it, without the password that it may have.
pub(in crate::experiments) fn address(url: &str) -> Result<Config, String> {
    let mut config: Config = url.parse().map_err(|error: tokio_postgres::Error| {
        format!("{}; write postgres://USER:PASSWORD@HOST:PORT/DATABASE", said(&error))
    })?;
    if config.get_hosts().is_empty() {
        return Err("it names no host; write postgres://USER:PASSWORD@HOST:PORT/DATABASE".into());
    }
    if config.get_ssl_mode() == SslMode::Require {
        return Err("sslmode=require is not supported: this program speaks to PostgreSQL without TLS; use a private network or a proxy on this machine that speaks TLS, and sslmode=disable".into());
    }
    if config.get_application_name().is_none() {
        config.application_name("understudy");
    }
    config.connect_timeout(CONNECTING).tcp_user_timeout(CONNECTING);
    Ok(config)
}

/// Where the database is, as people are told: no password.
pub(in crate::experiments) fn place(config: &Config) -> String {
    let hosts = config.get_hosts().iter().enumerate().map(|(at, host)| {
        let port = config.get_ports().get(at).or(config.get_ports().first()).unwrap_or(&5432);
        match host {
            Host::Tcp(name) => format!("{name}:{port}"),
            #[cfg(unix)]
            Host::Unix(folder) => format!("{}:{port}", folder.display()),
        }
    });
    let user = config.get_user().unwrap_or("");
    let database = config.get_dbname().unwrap_or(user);
    format!("postgres://{user}@{}/{database}", hosts.collect::<Vec<_>>().join(","))
}

/// A connection, and the half of it that has to be driven.
pub(super) async fn connect(
    config: &Config,
) -> Result<(Client, Connection<Socket, NoTlsStream>), Error> {
    let connected = timeout(CONNECTING, config.connect(NoTls)).await;
    let connected = connected.map_err(|_| {
        Error::Unreachable(format!("no connection within {} s", CONNECTING.as_secs()))
    })?;
    connected.map_err(|error| Error::Unreachable(said(&error)))
}

/// A connection that the runtime drives, for changes.
pub(super) async fn open(config: &Config) -> Result<Client, Error> {
    let (client, connection) = connect(config).await?;
    // Whoever asks next learns how it ended.
    tokio::spawn(connection);
    client.batch_execute(SESSION).await?;
    Ok(client)
}

impl From<tokio_postgres::Error> for Error {
    fn from(error: tokio_postgres::Error) -> Self {
        unreachable_or(error, Self::Storage)
    }
}

/// [`Error::Unreachable`] for what another try may cure, else what `otherwise` makes of the sentence.
pub(super) fn unreachable_or(
    error: tokio_postgres::Error,
    otherwise: impl FnOnce(String) -> Error,
) -> Error {
    let passes = match error.code() {
        // The classes of connections, transactions taken back, resources, intervention and the system; a database that
        // stands by is read-only.
        Some(code) => {
            ["08", "40", "53", "55", "57", "58"].contains(&&code.code()[..2])
                || *code == SqlState::READ_ONLY_SQL_TRANSACTION
                || *code == SqlState::IDLE_IN_TRANSACTION_SESSION_TIMEOUT
        }
        // Not the database's word, but the connection's.
        None => true,
    };
    let text = said(&error);
    if passes { Error::Unreachable(text) } else { otherwise(text) }
}

/// An error with its causes: the outermost alone says "db error".
fn said(error: &tokio_postgres::Error) -> String {
    if let Some(error) = error.as_db_error() {
        return error.message().to_owned();
    }
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}
