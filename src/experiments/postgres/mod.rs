//! Experiments and votes in a PostgreSQL database, which several servers share.
//!
//! Every change locks the experiment's row, reads what it is by now, changes that and commits. So servers lose nothing of each
//! other's, votes are counted in the order of their commits, on which the sequential test depends, and what guardrails and
//! ramps decide is decided once. Times are the database's. What an arm served is added to what the others' arms did, with
//! the next change or every few seconds.
//!
//! While the database cannot be reached, experiments go on splitting traffic as they were last seen, and changes are refused.

mod connection;
mod listener;
mod schema;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use tokio::{runtime::Runtime, time::timeout};
use tokio_postgres::{
    Client, Config, Row, Transaction,
    error::SqlState,
    types::{ToSql, Type},
};

use super::{
    Error,
    arms::Arm,
    ballot::{Choice, Pair, Vote},
    condition::Condition,
    experiment::{Experiment, Plan},
    rollout::Change,
    store::{Live, MAX_EXPERIMENTS, MAX_OPEN_PAIRS, PAIR_MILLISECONDS, Store, tell},
};
pub(super) use connection::{address, place};

/// Where servers tell each other that weights have changed.
const CHANNEL: &str = "understudy_experiments";

/// How long a change may take, the wait for the experiment's row included.
const CHANGING: Duration = Duration::from_secs(5);

/// After a connection failed none is tried for so long, so that those who wait are told at once.
const RETRY: Duration = Duration::from_millis(500);

/// Values of a query, each with its type, so that it is one trip.
type Parameters<'a, const N: usize> = [(&'a (dyn ToSql + Sync), Type); N];

/// The one of this server who reads and writes the database.
pub(super) struct PostgresStore {
    config: Config,
    runtime: Runtime,
    client: Option<Client>,
    /// The last connection that could not be made, and why.
    refused: Option<(Instant, Error)>,
    /// Whether the last thing that was asked failed by the database's fault.
    failing: bool,
    live: Live,
    /// What was read of each experiment in `live`.
    read: BTreeMap<String, Version>,
    /// Transactions with what this server served, by the number of their experiment, of which it is not known whether they
    /// were committed.
    unsure: BTreeMap<i64, String>,
    condition: Arc<Condition>,
}

/// Which experiment of its id, and which of its states.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Version {
    number: i64,
    version: i64,
}

/// An experiment whose row no other server changes now.
struct Locked<'a> {
    transaction: &'a Transaction<'a>,
    number: i64,
    /// Unix seconds of the database.
    now: u64,
    experiment: Experiment,
    /// What was decided by itself.
    decided: Vec<Change>,
    /// Whether there is something to be written.
    changed: bool,
    /// Whether others are to know at once.
    announced: bool,
}

impl PostgresStore {
    /// Connects, makes the tables where they are not, and reads the experiments.
    pub(super) fn open(config: Config, condition: Arc<Condition>) -> Result<Self, Error> {
        let runtime = runtime()?;
        let mut store = Self {
            config,
            runtime,
            client: None,
            refused: None,
            failing: false,
            live: Live::default(),
            read: BTreeMap::new(),
            unsure: BTreeMap::new(),
            condition,
        };
        store.connect()?;
        store.run(async |client| schema::prepare(client).await)?;
        store.read_all()?;
        Ok(store)
    }

    /// Connects where there is no connection, and reads all experiments then: where there is one they have been read.
    fn ready(&mut self) -> Result<(), Error> {
        if self.client.is_some() {
            // So that a connection that was closed meanwhile says so.
            self.runtime.block_on(tokio::task::yield_now());
        }
        if self.client.as_ref().is_some_and(|client| !client.is_closed()) {
            return Ok(());
        }
        self.connect()?;
        self.read_all().inspect_err(|_| self.client = None)
    }

    fn connect(&mut self) -> Result<(), Error> {
        self.client = None;
        if let Some((at, error)) = &self.refused
            && at.elapsed() < RETRY
        {
            return Err(error.clone());
        }
        match self.runtime.block_on(connection::open(&self.config)) {
            Ok(client) => {
                self.client = Some(client);
                Ok(())
            }
            Err(error) => {
                self.refused = Some((Instant::now(), error.clone()));
                self.note(&error);
                Err(error)
            }
        }
    }

    fn read_all(&mut self) -> Result<(), Error> {
        let arrived = self.arrived()?;
        self.read.clear();
        self.read_changed(&arrived)?;
        self.unsure.clear();
        Ok(())
    }

    /// Numbers of the experiments whose counts were on their way when a connection broke, and have arrived.
    fn arrived(&mut self) -> Result<BTreeSet<i64>, Error> {
        let mut arrived = BTreeSet::new();
        for (number, transaction) in self.unsure.clone() {
            let sql = "SELECT pg_xact_status($1::text::xid8)";
            let asked = async |client: &mut Client| {
                let row = client.query_typed_one(sql, &[(&transaction, Type::TEXT)]).await?;
                Ok(row.get::<_, Option<String>>(0))
            };
            match self.run(asked)?.as_deref() {
                Some("aborted") => {}
                Some("in progress") => {
                    let still = "an earlier change is not over there yet";
                    return Err(Error::Unreachable(still.into()));
                }
                // One so old that it is forgotten has most likely been committed.
                _ => drop(arrived.insert(number)),
            }
        }
        Ok(arrived)
    }

    /// Has the database do something, within a time. A connection that failed is given up.
    fn run<R>(
        &mut self,
        job: impl AsyncFnOnce(&mut Client) -> Result<R, Error>,
    ) -> Result<R, Error> {
        let Some(client) = &mut self.client else {
            return Err(Error::Unreachable("there is no connection".into()));
        };
        let job = async {
            let done = job(client).await;
            if done.is_err() {
                // What it had begun is taken back now, and not when somebody asks for something else: others wait for it.
                client.check_connection().await?;
            }
            done
        };
        let done = self.runtime.block_on(async { timeout(CHANGING, job).await });
        let late = || format!("no answer within {} s", CHANGING.as_secs());
        let done = done.unwrap_or_else(|_| Err(Error::Unreachable(late())));
        match &done {
            Ok(_) => {
                if std::mem::take(&mut self.failing) {
                    tracing::info!("the database of experiments answers again");
                }
                self.condition.kept();
            }
            Err(error @ (Error::Unreachable(_) | Error::Storage(_) | Error::Unavailable(_))) => {
                self.client = None;
                self.note(error);
            }
            Err(_) => {}
        }
        done
    }

    /// Something failed that is the database's fault.
    fn note(&mut self, error: &Error) {
        if !std::mem::replace(&mut self.failing, true) {
            tracing::error!(%error, "experiments not kept");
        }
        self.condition.failed(error.to_string(), false);
    }

    /// Reads what is not as it was read; `arrived` are the numbers of experiments whose counts on their way are there.
    fn read_changed(&mut self, arrived: &BTreeSet<i64>) -> Result<(), Error> {
        let before = self.read.clone();
        let (found, rows) = self.run(async |client| {
            let list = "SELECT id, number, version FROM understudy_experiments";
            let found: BTreeMap<String, Version> = client
                .query_typed(list, &[])
                .await?
                .iter()
                .map(|row| (row.get(0), Version { number: row.get(1), version: row.get(2) }))
                .collect();
            let changed = found.iter().filter(|(id, version)| before.get(*id) != Some(version));
            let changed: Vec<i64> = changed.map(|(_, version)| version.number).collect();
            if changed.is_empty() {
                return Ok((found, Vec::new()));
            }
            let read = "SELECT number, id, version, record::text FROM understudy_experiments
                WHERE number = ANY($1)";
            let rows = client.query_typed(read, &[(&changed, Type::INT8_ARRAY)]).await?;
            Ok((found, rows))
        })?;
        {
            let mut live = self.live.write().unwrap_or_else(PoisonError::into_inner);
            live.retain(|id, _| found.contains_key(id));
        }
        self.read.retain(|id, _| found.contains_key(id));
        for row in rows {
            let version = Version { number: row.get(0), version: row.get(2) };
            let experiment = experiment(&row)?;
            self.publish(experiment, version, arrived.contains(&version.number));
        }
        Ok(())
    }

    /// Shows what the database has.
    fn publish(
        &mut self,
        experiment: Experiment,
        version: Version,
        arrived: bool,
    ) -> Arc<Experiment> {
        let id = experiment.id.clone();
        let before = self.live_of(&id).filter(|before| before.created == experiment.created);
        let known = self.read.insert(id.clone(), version);
        let another = known.is_some_and(|known| known.number != version.number);
        let experiment = match before.filter(|_| !another) {
            Some(before) => experiment.in_place_of(&before, arrived),
            None => experiment,
        };
        let experiment = Arc::new(experiment);
        let mut live = self.live.write().unwrap_or_else(PoisonError::into_inner);
        live.insert(id, Arc::clone(&experiment));
        experiment
    }

    fn live_of(&self, id: &str) -> Option<Arc<Experiment>> {
        self.live.read().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    /// Changes an experiment as it is in the database by now, what this server has served since the last time included.
    fn change<R>(
        &mut self,
        id: &str,
        change: impl AsyncFnOnce(&mut Locked<'_>) -> Result<R, Error>,
    ) -> Result<R, Error> {
        self.ready()?;
        let own = self.live_of(id).zip(self.read.get(id).copied());
        let mut sent = None;
        let done = self.run(async |client| {
            let transaction = client.transaction().await?;
            let lock = "SELECT number, id, floor(extract(epoch FROM now()))::bigint, record::text,
                pg_current_xact_id()::text FROM understudy_experiments WHERE id = $1
                FOR NO KEY UPDATE";
            let row = transaction.query_typed_opt(lock, &[(&id, Type::TEXT)]).await?;
            let row = row.ok_or_else(|| Error::Unknown(id.to_owned()))?;
            let (number, now): (i64, i64) = (row.get(0), row.get(2));
            let experiment = experiment(&row)?;
            if let Some((own, version)) = &own
                && version.number == number
            {
                experiment.add(&own.to_add());
                sent = Some((number, row.get::<_, String>(4)));
            }
            let mut locked = Locked {
                transaction: &transaction,
                number,
                now: now as u64,
                experiment,
                decided: Vec::new(),
                changed: true,
                announced: false,
            };
            let result = change(&mut locked).await?;
            let Locked { experiment, decided, changed, announced, .. } = locked;
            if !changed {
                transaction.rollback().await?;
                return Ok((result, None));
            }
            let put = "UPDATE understudy_experiments
                SET record = $2::text::json, version = nextval('understudy_versions') WHERE number = $1
                RETURNING version";
            let record = record(&experiment)?;
            let parameters: Parameters<2> =
                [(&number, Type::INT8), (&record, Type::TEXT)];
            let version = transaction.query_typed_one(put, &parameters).await?.get(0);
            if announced || !decided.is_empty() {
                announce(&transaction).await?;
            }
            transaction.commit().await?;
            Ok((result, Some((experiment, Version { number, version }, decided))))
        });
        if let (Err(Error::Unreachable(_) | Error::Storage(_)), Some((number, transaction))) =
            (&done, &sent)
        {
            self.unsure.insert(*number, transaction.clone());
        }
        let (result, written) = done?;
        if let Some((experiment, version, decided)) = written {
            tell(&self.publish(experiment, version, sent.is_some()), &decided);
        }
        Ok(result)
    }
}

impl Store for PostgresStore {
    fn live(&self) -> Live {
        Arc::clone(&self.live)
    }

    fn create(&mut self, id: &str, arms: Vec<Arm>, plan: Plan) -> Result<Arc<Experiment>, Error> {
        let mut experiment = Experiment::new(id.to_owned(), 0, arms, plan)?;
        self.ready()?;
        let (experiment, version) = self.run(async |client| {
            let transaction = client.transaction().await?;
            // One server at a time, so that all count alike.
            transaction.batch_execute(schema::LOCK).await?;
            let count = "SELECT count(*), coalesce(bool_or(id = $1), false),
                floor(extract(epoch FROM now()))::bigint FROM understudy_experiments";
            let row = transaction.query_typed_one(count, &[(&id, Type::TEXT)]).await?;
            let (count, exists, now): (i64, bool, i64) = (row.get(0), row.get(1), row.get(2));
            if exists {
                return Err(Error::Exists(id.to_owned()));
            }
            if count >= MAX_EXPERIMENTS as i64 {
                return Err(Error::TooMany);
            }
            experiment.created = now as u64;
            let put = "INSERT INTO understudy_experiments (id, record) VALUES ($1, $2::text::json)
                RETURNING number, version";
            let record = record(&experiment)?;
            let parameters: Parameters<2> = [(&id, Type::TEXT), (&record, Type::TEXT)];
            let row = transaction.query_typed_one(put, &parameters).await?;
            announce(&transaction).await?;
            transaction.commit().await?;
            Ok((experiment, Version { number: row.get(0), version: row.get(1) }))
        })?;
        Ok(self.publish(experiment, version, false))
    }

    fn reweight(&mut self, id: &str, changes: &[Arm]) -> Result<Arc<Experiment>, Error> {
        self.change(id, async |locked| {
            locked.experiment = locked.experiment.reweighted(changes)?;
            locked.announced = true;
            Ok(())
        })?;
        self.live_of(id).ok_or_else(|| Error::Unknown(id.to_owned()))
    }

    fn review(&mut self, id: &str) -> Result<(), Error> {
        let Some(experiment) = self.live_of(id) else { return Ok(()) };
        // Observations from here on may ask for the next review.
        experiment.end_review();
        // What is seen here decides whether the database is asked, and what is seen there what is decided.
        if experiment.reviewed(0).is_none() {
            return Ok(());
        }
        let reviewed = self.change(id, async |locked| {
            locked.review();
            Ok(())
        });
        match reviewed {
            Ok(_) | Err(Error::Unknown(_)) => Ok(()),
            Err(error) => {
                // Not asked again at every request, but when traffic is saved.
                experiment.take_review();
                Err(error)
            }
        }
    }

    fn delete(&mut self, id: &str) -> Result<(), Error> {
        self.ready()?;
        self.run(async |client| {
            let transaction = client.transaction().await?;
            let delete = "DELETE FROM understudy_experiments WHERE id = $1";
            if transaction.execute_typed(delete, &[(&id, Type::TEXT)]).await? == 0 {
                return Err(Error::Unknown(id.to_owned()));
            }
            announce(&transaction).await?;
            Ok(transaction.commit().await?)
        })?;
        self.read.remove(id);
        self.live.write().unwrap_or_else(PoisonError::into_inner).remove(id);
        Ok(())
    }

    fn open_pair(&mut self, id: &str, pair: &Pair) -> Result<String, Error> {
        self.ready()?;
        let unknown = || Error::Unknown(id.to_owned());
        let experiment = self.live_of(id).ok_or_else(unknown)?;
        // The experiment may be another one of the same id by now.
        if !pair.models.iter().all(|model| experiment.arm(model).is_some()) {
            return Err(unknown());
        }
        let number = self.read.get(id).ok_or_else(unknown)?.number;
        let random = getrandom::u64().map_err(|error| Error::Storage(error.to_string()))?;
        let (random, seed) = (format!("{random:016x}"), pair.seed as i64);
        let (first, second) = (&pair.models[0], &pair.models[1]);
        let (age, most) = (PAIR_MILLISECONDS as i64, MAX_OPEN_PAIRS as i64);
        self.run(async |client| {
            let put = "INSERT INTO understudy_open_pairs (pair, experiment, first, second, seed)
                VALUES (
                    lpad(to_hex((extract(epoch FROM now()) * 1000)::bigint), 12, '0') || $1,
                    $2, $3, $4, $5
                ) RETURNING pair";
            let parameters: Parameters<5> = [
                (&random, Type::TEXT),
                (&number, Type::INT8),
                (first, Type::TEXT),
                (second, Type::TEXT),
                (&seed, Type::INT8),
            ];
            let put = client.query_typed_one(put, &parameters).await;
            let put = put.map_err(|error| match error.code() {
                Some(code) if *code == SqlState::FOREIGN_KEY_VIOLATION => unknown(),
                _ => error.into(),
            })?;
            // Those that a vote or another server is at are left to it.
            let forget = "DELETE FROM understudy_open_pairs WHERE pair IN (
                SELECT pair FROM understudy_open_pairs WHERE pair < greatest(
                    lpad(to_hex((extract(epoch FROM now()) * 1000)::bigint - $1), 12, '0'),
                    (SELECT pair FROM understudy_open_pairs ORDER BY pair DESC OFFSET $2 - 1 LIMIT 1)
                ) FOR UPDATE SKIP LOCKED)";
            let parameters: Parameters<2> =
                [(&age, Type::INT8), (&most, Type::INT8)];
            client.execute_typed(forget, &parameters).await?;
            Ok(put.get(0))
        })
    }

    fn vote(
        &mut self,
        id: &str,
        pair_id: &str,
        choice: Choice,
        key: &str,
    ) -> Result<(Vote, bool), Error> {
        self.change(id, async |locked| locked.vote(pair_id, choice, key).await)
    }

    fn save_traffic(&mut self) -> Result<(), Error> {
        let all: Vec<_> = {
            let live = self.live.read().unwrap_or_else(PoisonError::into_inner);
            live.values().filter(|experiment| experiment.take_unsaved()).cloned().collect()
        };
        let mut saved = Ok(());
        for experiment in all {
            experiment.end_review();
            let added = self.change(&experiment.id, async |locked| {
                locked.review();
                Ok(())
            });
            match added {
                Ok(_) | Err(Error::Unknown(_)) => {}
                Err(error) => {
                    experiment.mark_unsaved();
                    saved = Err(error);
                }
            }
        }
        saved
    }

    fn refresh(&mut self) -> Result<(), Error> {
        self.ready()?;
        self.read_changed(&BTreeSet::new())
    }

    fn close(&mut self) -> Result<(), Error> {
        self.save_traffic()?;
        self.client = None;
        Ok(())
    }

    fn forget(&mut self) {
        self.client = None;
    }
}

impl Locked<'_> {
    /// Does what guardrails and ramp say by now.
    fn review(&mut self) {
        if let Some((reviewed, decided)) = self.experiment.reviewed(self.now) {
            (self.experiment, self.decided) = (reviewed, decided);
        }
    }

    /// Counts a vote; `false` where it was counted before.
    async fn vote(
        &mut self,
        pair_id: &str,
        choice: Choice,
        key: &str,
    ) -> Result<(Vote, bool), Error> {
        let found = "SELECT pair, key, first, second, seed, choice,
            floor(extract(epoch FROM at))::bigint
            FROM understudy_votes WHERE experiment = $1 AND (pair = $2 OR key = $3)";
        let parameters: Parameters<3> =
            [(&self.number, Type::INT8), (&pair_id, Type::TEXT), (&key, Type::TEXT)];
        let found = self.transaction.query_typed(found, &parameters).await?;
        let found: Vec<(String, Vote)> = found.iter().map(vote).collect::<Result<_, _>>()?;
        let keyed = found.iter().find(|(_, vote)| vote.key == key);
        let voted = found.iter().any(|(pair, _)| pair == pair_id);
        match keyed {
            Some((pair, vote)) if pair == pair_id && vote.choice == choice => {
                self.changed = false;
                return Ok((vote.clone(), false));
            }
            Some(_) => return Err(Error::KeyUsed(key.to_owned())),
            None if voted => return Err(Error::Voted(pair_id.to_owned())),
            None => {}
        }

        let unknown = || Error::UnknownPair(pair_id.to_owned());
        let take = "DELETE FROM understudy_open_pairs WHERE pair = $1 AND experiment = $2
            AND opened > now() - $3 * interval '1 millisecond' RETURNING first, second, seed";
        let age = PAIR_MILLISECONDS as f64;
        let parameters: Parameters<3> =
            [(&pair_id, Type::TEXT), (&self.number, Type::INT8), (&age, Type::FLOAT8)];
        let taken = self.transaction.query_typed_opt(take, &parameters).await?;
        let taken = taken.ok_or_else(unknown)?;
        let (models, seed): ([String; 2], i64) = ([taken.get(0), taken.get(1)], taken.get(2));
        if !self.experiment.count(models.each_ref().map(String::as_str), choice.of_first()) {
            return Err(unknown());
        }

        let put =
            "INSERT INTO understudy_votes (experiment, pair, key, first, second, seed, choice)
            VALUES ($1, $2, $3, $4, $5, $6, $7)";
        let name = name(choice);
        let parameters: Parameters<7> = [
            (&self.number, Type::INT8),
            (&pair_id, Type::TEXT),
            (&key, Type::TEXT),
            (&models[0], Type::TEXT),
            (&models[1], Type::TEXT),
            (&seed, Type::INT8),
            (&name, Type::TEXT),
        ];
        self.transaction.execute_typed(put, &parameters).await?;
        self.review();
        let pair = Pair { models, seed: seed as u64 };
        Ok((Vote { pair, choice, key: key.to_owned(), at: self.now }, true))
    }
}

/// Has a thread of its own call `look` whenever other servers may have changed something, until it returns false.
pub(super) fn listen(
    config: Config,
    look: impl FnMut() -> bool + Send + 'static,
) -> Result<(), Error> {
    let runtime = runtime()?;
    let listen = move || runtime.block_on(listener::listen(&config, look));
    let thread = std::thread::Builder::new().name("experiments-notices".into()).spawn(listen);
    thread.map(drop).map_err(|error| Error::Unavailable(format!("no thread for notices: {error}")))
}

fn runtime() -> Result<Runtime, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| Error::Unavailable(format!("no async runtime: {error}")))
}

async fn announce(transaction: &Transaction<'_>) -> Result<(), Error> {
    Ok(transaction.batch_execute(&format!("NOTIFY {CHANNEL}")).await?)
}

/// The experiment of a row with its id second and its record fourth.
fn experiment(row: &Row) -> Result<Experiment, Error> {
    let (id, record): (String, &str) = (row.get(1), row.get(3));
    let unread = format!("what it says of the experiment {id:?} cannot be read");
    let record = serde_json::from_str(record).ok();
    let experiment = record.and_then(|record| Experiment::from_record(id, record));
    experiment.ok_or(Error::Storage(unread))
}

fn record(experiment: &Experiment) -> Result<String, Error> {
    let record = serde_json::to_string(&experiment.record());
    record.map_err(|error| Error::Storage(error.to_string()))
}

/// A vote, and the pair that it was on.
fn vote(row: &Row) -> Result<(String, Vote), Error> {
    let choice = match row.get(5) {
        "first" => Choice::First,
        "second" => Choice::Second,
        "tie" => Choice::Tie,
        other => return Err(Error::Storage(format!("a vote says {other:?}"))),
    };
    let seed: i64 = row.get(4);
    let pair = Pair { models: [row.get(2), row.get(3)], seed: seed as u64 };
    let at: i64 = row.get(6);
    Ok((row.get(0), Vote { pair, choice, key: row.get(1), at: at as u64 }))
}

fn name(choice: Choice) -> &'static str {
    match choice {
        Choice::First => "first",
        Choice::Second => "second",
        Choice::Tie => "tie",
    }
}
