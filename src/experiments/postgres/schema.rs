//! The tables, and how they are made: all changes of one format at once, by one server at a time.

use tokio_postgres::{Client, Transaction};

use super::{Error, connection::unreachable_or};

/// What the tables mean; a database of a later format is not touched.
const FORMAT: i32 = 1;

/// The advisory lock that servers take to change the tables, and to create experiments: "understd" as a number.
pub(super) const LOCK: &str = "SELECT pg_advisory_xact_lock(8461811136750384228)";

/// `pg_current_xact_id` and `pg_xact_status` under these names.
const OLDEST: &str = "130000";

/// Each takes a database from the format of its index to the next.
const MIGRATIONS: [&str; FORMAT as usize] = ["
    CREATE SEQUENCE understudy_versions;

    -- The record is JSON. Its version changes whenever it does; its number is never another experiment's.
    CREATE TABLE understudy_experiments (
        id text PRIMARY KEY,
        number bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
        version bigint NOT NULL DEFAULT nextval('understudy_versions'),
        record json NOT NULL
    );

    -- A pair's id begins with the time at which it was opened, so the first is the oldest.
    CREATE TABLE understudy_open_pairs (
        pair text COLLATE \"C\" PRIMARY KEY,
        experiment bigint NOT NULL REFERENCES understudy_experiments (number) ON DELETE CASCADE,
        opened timestamptz NOT NULL DEFAULT now(),
        first text NOT NULL,
        second text NOT NULL,
        seed bigint NOT NULL
    );
    CREATE INDEX ON understudy_open_pairs (experiment);

    -- Numbers rise in the order of the commits of an experiment's votes.
    CREATE TABLE understudy_votes (
        number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        experiment bigint NOT NULL REFERENCES understudy_experiments (number) ON DELETE CASCADE,
        pair text NOT NULL,
        key text NOT NULL,
        first text NOT NULL,
        second text NOT NULL,
        seed bigint NOT NULL,
        choice text NOT NULL CHECK (choice IN ('first', 'second', 'tie')),
        at timestamptz NOT NULL DEFAULT now(),
        UNIQUE (experiment, pair),
        UNIQUE (experiment, key)
    );
"];

/// Makes the tables where they are not, or brings them to this version's format.
///
/// # Errors
/// [`Error::Unavailable`] for a server or a format that this version cannot use; [`Error::Unreachable`].
pub(super) async fn prepare(client: &mut Client) -> Result<(), Error> {
    let version = "SELECT current_setting('server_version_num')::int >= $1::text::int,
        current_setting('server_version')";
    let row = client.query_one(version, &[&OLDEST]).await?;
    if !row.get::<_, bool>(0) {
        let version: String = row.get(1);
        return Err(Error::Unavailable(format!(
            "it is PostgreSQL {version}, and experiments take 13 or later"
        )));
    }
    let transaction = client.transaction().await?;
    migrate(&transaction).await?;
    transaction.commit().await?;
    Ok(())
}

async fn migrate(transaction: &Transaction<'_>) -> Result<(), Error> {
    transaction.batch_execute(LOCK).await?;
    let known = "SELECT to_regclass('understudy_format') IS NOT NULL";
    let format: i32 = match transaction.query_one(known, &[]).await?.get(0) {
        true => transaction.query_one("SELECT format FROM understudy_format", &[]).await?.get(0),
        false => {
            let make = "CREATE TABLE understudy_format AS SELECT 0 AS format";
            transaction.batch_execute(make).await.map_err(not_made)?;
            0
        }
    };
    let Some(due) = usize::try_from(format).ok().and_then(|format| MIGRATIONS.get(format..)) else {
        return Err(Error::Unavailable(format!(
            "its format is {format}, this version of Understudy reads {FORMAT}; use the version that wrote it, or another database"
        )));
    };
    for migration in due {
        transaction.batch_execute(migration).await.map_err(not_made)?;
    }
    if !due.is_empty() {
        let done = format!("UPDATE understudy_format SET format = {FORMAT}");
        transaction.batch_execute(&done).await?;
    }
    Ok(())
}

fn not_made(error: tokio_postgres::Error) -> Error {
    unreachable_or(error, |problem| {
        Error::Unavailable(format!(
            "its tables cannot be made: {problem}; the user needs the right to create tables in its schema, at least the first time"
        ))
    })
}
