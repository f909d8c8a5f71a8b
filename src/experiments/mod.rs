//! Experiments: traffic split between models by weight, and people's votes on blind pairs of their images.
//!
//! Statistics are pure and each in a file of its own: [`split`] (which arm a key belongs to), [`wilson`],
//! [`sequential`], and [`tally`] that puts them together. So is what stops an arm ([`Guardrails`]) and what gives it more
//! traffic ([`Ramp`]). [`Experiments`] is what the rest of the server
//! uses: what is asked while a request is served comes from memory; what changes goes through one thread that
//! owns the store, so that no thread that serves requests waits for a disk: a file of this server's own
//! ([`file`]), or a database that servers share (`postgres`).

mod arms;
mod ballot;
mod compared;
mod condition;
#[cfg(test)]
mod contract_tests;
mod experiment;
mod file;
#[cfg(test)]
mod golden;
mod guardrails;
mod ledger;
mod postgres;
mod ramp;
mod rollout;
pub mod sequential;
mod series;
pub mod split;
mod store;
pub mod tally;
#[cfg(test)]
mod tests;
mod traffic;
mod votes;
pub mod wilson;

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{
        Arc, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    time::{Duration, Instant},
};

use prometheus::core::Collector;
use tokio::sync::oneshot;
use tokio_postgres::Config;

pub use arms::{ARMS, Arm, MAX_WEIGHT};
pub use ballot::{Choice, Pair, Vote};
pub use condition::Trouble;
pub use experiment::{Experiment, Plan};
pub use guardrails::{Evidence, Guardrail, Guardrails, Measured, Reason};
pub use ramp::{Phase, Ramp};
pub use rollout::{CONTROL, Rollout, Stopped};
pub use store::{MAX_EXPERIMENTS, MAX_OPEN_PAIRS, PAIR_MILLISECONDS};
pub use traffic::Traffic;
pub use votes::Votes;

use crate::names::is_id;
use condition::Condition;
use file::FileStore;
use postgres::PostgresStore;
use series::Series;
use store::{Live, Store};

/// Longest id of an experiment and longest idempotency key, in bytes.
pub const MAX_NAME_BYTES: usize = 64;

/// How often what the arms served is written down. Votes and experiments are at once; after a crash the
/// counts of requests lag by so much at most.
const SAVE_EVERY: Duration = Duration::from_secs(5);

/// Why something could not be done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A value that cannot be honoured.
    #[error("`{field}` is {value}: {remedy}")]
    Value {
        /// Where it stands.
        field: String,
        /// As it was sent.
        value: String,
        /// The limit and the way out.
        remedy: String,
    },
    /// No such experiment.
    #[error("there is no experiment {0:?} here; GET /v1/experiments lists them")]
    Unknown(String),
    /// The id is taken.
    #[error(
        "there is an experiment {0:?} already; PATCH changes its weights, DELETE removes it and its votes"
    )]
    Exists(String),
    /// The limit on experiments is reached.
    #[error(
        "there are {limit} experiments, which is the limit; DELETE one that is over first", limit = MAX_EXPERIMENTS
    )]
    TooMany,
    /// No such pair waits for a vote.
    #[error(
        "no pair {0:?} of this experiment waits for a vote: a pair is forgotten after {hours} hours, or when {limit} younger ones wait; ask for another with POST …/pairs", hours = PAIR_MILLISECONDS / 3_600_000, limit = MAX_OPEN_PAIRS
    )]
    UnknownPair(String),
    /// The pair has its vote.
    #[error("the pair {0:?} was voted on before under another key; a pair takes one vote")]
    Voted(String),
    /// The key names another vote.
    #[error(
        "{0:?} is the key of another vote; a vote is sent again unchanged, a new one takes a new key"
    )]
    KeyUsed(String),
    /// Nothing can be kept.
    #[error("{0}")]
    Unavailable(String),
    /// The database that servers share does not answer, or not now.
    #[error(
        "the database of experiments cannot be reached ({0}), so nothing can be kept now; send it again, unchanged, when Retry-After has passed"
    )]
    Unreachable(String),
    /// The disk is full; nothing was changed.
    #[error(
        "the disk that {0} is on is full, so nothing can be kept; free some space, or name a folder on another disk with --data-dir"
    )]
    Full(String),
    /// The file is not where it was opened, so what is written to it would be lost; nothing counts as kept.
    #[error(
        "{0} was removed or replaced while the server had it open, so nothing can be kept; put it back, or start the server anew"
    )]
    Removed(String),
    /// What the file says makes no sense.
    #[error(
        "the database of experiments is damaged ({0}); move the file away, or put a copy of it in its place, and start the server anew"
    )]
    Damaged(String),
    /// The disk or the file failed.
    #[error("the database of experiments failed: {0}")]
    Storage(String),
}

type Job = Box<dyn FnOnce(&mut dyn Store) + Send>;

/// All experiments of the server. Dropping it writes down what is not yet.
pub struct Experiments {
    live: Live,
    condition: Arc<Condition>,
    /// To the thread that owns the database, or why there is none.
    jobs: Result<Arc<Sender<Job>>, String>,
    /// Whether other servers change the same experiments.
    shared: bool,
}

impl Experiments {
    /// Reads the experiments kept in `folder`. With `make` the folder and the database are made now, so that
    /// a place that cannot be used is known at once; else with the first experiment.
    ///
    /// # Errors
    /// A sentence that names the file.
    pub fn open(folder: &Path, make: bool) -> Result<Self, String> {
        let condition = Arc::new(Condition::new().map_err(|error| error.to_string())?);
        let store = FileStore::open(folder, make, Arc::clone(&condition));
        let store = store.map_err(|error| error.to_string())?;
        Self::kept_by(Box::new(store), condition, false)
    }

    /// Which PostgreSQL database an address names.
    ///
    /// # Errors
    /// What is wrong with it, without its password.
    pub fn address(url: &str) -> Result<Config, String> {
        postgres::address(url)
    }

    /// An address as people are told it, without its password.
    pub fn place(database: &Config) -> String {
        postgres::place(database)
    }

    /// Shares the experiments of a PostgreSQL database with the other servers that do.
    ///
    /// # Errors
    /// A sentence that names the database, without its password.
    pub fn shared(database: &Config) -> Result<Self, String> {
        let place = postgres::place(database);
        let condition = Arc::new(Condition::new().map_err(|error| error.to_string())?);
        let store = PostgresStore::open(database.clone(), Arc::clone(&condition));
        let store = store.map_err(|error| match error {
            Error::Unreachable(problem) => format!(
                "{place} cannot be reached: {problem}; start PostgreSQL, mend the address, or leave --database-url out to keep experiments in a file"
            ),
            Error::Unavailable(problem) | Error::Storage(problem) => {
                format!("{place} cannot be used: {problem}")
            }
            error => format!("{place} cannot be used: {error}"),
        })?;
        let experiments = Self::kept_by(Box::new(store), condition, true)?;
        experiments.listen(database.clone()).map_err(|error| error.to_string())?;
        Ok(experiments)
    }

    fn kept_by(
        store: Box<dyn Store>,
        condition: Arc<Condition>,
        shared: bool,
    ) -> Result<Self, String> {
        let (live, told) = (store.live(), Arc::clone(&condition));
        let (jobs, waiting) = channel();
        std::thread::Builder::new()
            .name("experiments".into())
            .spawn(move || work(store, &waiting, &told))
            .map_err(|error| format!("no thread for experiments: {error}"))?;
        Ok(Self { live, condition, jobs: Ok(Arc::new(jobs)), shared })
    }

    /// Has what other servers change read, as long as somebody can ask for it.
    fn listen(&self, database: Config) -> Result<(), Error> {
        let (jobs, condition) = (Arc::downgrade(self.jobs()?), Arc::clone(&self.condition));
        let asked = Arc::new(AtomicBool::new(false));
        postgres::listen(database, move || {
            let Some(jobs) = jobs.upgrade() else { return false };
            if asked.swap(true, Ordering::AcqRel) {
                return true;
            }
            let (asked, condition) = (Arc::clone(&asked), Arc::clone(&condition));
            let job = move |store: &mut dyn Store| {
                // Changes from here on are seen the next time.
                asked.store(false, Ordering::Release);
                // What failed is logged where it did.
                let _ = caught(store, &condition, |store| store.refresh());
            };
            jobs.send(Box::new(job)).is_ok()
        })
    }

    /// None, and none can be created, for that reason.
    ///
    /// # Panics
    /// Never, unless a metric's name is a mistake.
    pub fn unavailable(reason: String) -> Self {
        let condition = Arc::new(Condition::new().expect("names that Prometheus takes"));
        Self { live: Live::default(), condition, jobs: Err(reason), shared: false }
    }

    /// Why nothing was kept when somebody last asked for it; `None` while all is well.
    pub fn trouble(&self) -> Option<Trouble> {
        self.condition.trouble()
    }

    /// All of them by id.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub fn list(&self) -> Result<Vec<Arc<Experiment>>, Error> {
        self.jobs()?;
        let live = self.live.read().unwrap_or_else(PoisonError::into_inner);
        Ok(live.values().cloned().collect())
    }

    /// One of them.
    ///
    /// # Errors
    /// [`Error::Unknown`], [`Error::Unavailable`].
    pub fn get(&self, id: &str) -> Result<Arc<Experiment>, Error> {
        self.jobs()?;
        let live = self.live.read().unwrap_or_else(PoisonError::into_inner);
        live.get(id).cloned().ok_or_else(|| Error::Unknown(id.to_owned()))
    }

    /// One of them, asked of the others' database where it is not known here.
    ///
    /// # Errors
    /// [`Error::Unknown`], [`Error::Unavailable`], [`Error::Unreachable`].
    pub async fn find(&self, id: &str) -> Result<Arc<Experiment>, Error> {
        match self.get(id) {
            Err(Error::Unknown(_)) if self.shared && check_id(id).is_ok() => {
                self.run(|store| store.refresh()).await?;
                self.get(id)
            }
            found => found,
        }
    }

    /// Begins an experiment.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn create(
        &self,
        id: String,
        arms: Vec<Arm>,
        plan: Plan,
    ) -> Result<Arc<Experiment>, Error> {
        check_id(&id)?;
        self.run(move |store| store.create(&id, arms, plan)).await
    }

    /// Counts an answered request that an arm served.
    pub fn served(&self, experiment: &Experiment, arm: usize, images: usize, seconds: f64) {
        experiment.serve(arm, images, seconds);
        self.review(experiment);
    }

    /// Counts images that an arm drew and its teacher repeated: their PSNR in dB, and their SSIM where they have one.
    pub fn compared(
        &self,
        experiment: &Experiment,
        arm: usize,
        images: impl IntoIterator<Item = (f64, Option<f64>)>,
    ) {
        for (psnr_db, ssim) in images {
            experiment.compare(arm, psnr_db, ssim);
        }
        self.review(experiment);
    }

    /// Has what was observed decided on, without waiting for it.
    fn review(&self, experiment: &Experiment) {
        let Ok(jobs) = self.jobs() else { return };
        if !experiment.take_review() {
            return;
        }
        let (id, condition) = (experiment.id.clone(), Arc::clone(&self.condition));
        let job = move |store: &mut dyn Store| {
            // What failed is logged where it did.
            let _ = caught(store, &condition, |store| store.review(&id));
        };
        let _ = jobs.send(Box::new(job));
    }

    /// Changes the weights of the arms in `changes`; the others keep theirs. A ramp is over then, and a stopped arm that
    /// gets a weight is watched anew.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn reweight(&self, id: String, changes: Vec<Arm>) -> Result<Arc<Experiment>, Error> {
        self.run(move |store| store.reweight(&id, &changes)).await
    }

    /// Ends an experiment and forgets its votes.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn delete(&self, id: String) -> Result<(), Error> {
        self.run(move |store| store.delete(&id)).await
    }

    /// Keeps a pair until it is voted on; returns its id, which nobody can guess.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn open_pair(&self, id: String, pair: Pair) -> Result<String, Error> {
        self.run(move |store| store.open_pair(&id, &pair)).await
    }

    /// Counts a vote; it is on the disk when this returns. `true` the first time, `false` when the same
    /// vote had been counted under the same key before.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn vote(
        &self,
        id: String,
        pair_id: String,
        choice: Choice,
        key: String,
    ) -> Result<(Vote, bool), Error> {
        if key.is_empty() || key.len() > MAX_NAME_BYTES {
            let remedy = format!("a key has 1 to {MAX_NAME_BYTES} bytes");
            let value = format!("{} bytes long", key.len());
            return Err(Error::Value { field: "idempotency_key".into(), value, remedy });
        }
        self.run(move |store| store.vote(&id, &pair_id, choice, &key)).await
    }

    /// Writes down what the arms have served, and closes the file. Whoever asks for more opens it again.
    ///
    /// # Errors
    /// [`Error::Storage`].
    pub async fn close(&self) -> Result<(), Error> {
        if self.jobs.is_err() {
            return Ok(());
        }
        self.run(|store| store.close()).await
    }

    /// Their Prometheus series.
    ///
    /// # Errors
    /// Never, unless a metric's name is a mistake.
    pub fn series(&self) -> prometheus::Result<Box<dyn Collector>> {
        Ok(Box::new(Series::new(Arc::clone(&self.live), Arc::clone(&self.condition))?))
    }

    fn jobs(&self) -> Result<&Arc<Sender<Job>>, Error> {
        self.jobs.as_ref().map_err(|reason| Error::Unavailable(reason.clone()))
    }

    /// Has the thread that owns the database do something; it is done even where nobody waits any more.
    async fn run<R: Send + 'static>(
        &self,
        job: impl FnOnce(&mut dyn Store) -> Result<R, Error> + Send + 'static,
    ) -> Result<R, Error> {
        let ended = || Error::Storage("the thread that owns it has ended".into());
        let (sender, receiver) = oneshot::channel();
        let condition = Arc::clone(&self.condition);
        let job = Box::new(move |store: &mut dyn Store| {
            let done = caught(store, &condition, job);
            // Told first by health and metrics, then by the answer.
            let damaged = || Err(Error::Damaged("it panicked, and the log has the cause".into()));
            let _ = sender.send(done.unwrap_or_else(damaged));
        });
        self.jobs()?.send(job).map_err(|_| ended())?;
        receiver.await.map_err(|_| ended())?
    }
}

fn check_id(id: &str) -> Result<(), Error> {
    if is_id(id) && id.len() <= MAX_NAME_BYTES {
        return Ok(());
    }
    let remedy = format!(
        "an id is 1 to {MAX_NAME_BYTES} letters, digits, `.`, `_` and `-`; `.`, `..`, `auto` and `draft` are reserved"
    );
    Err(Error::Value { field: "id".into(), value: format!("{id:?}"), remedy })
}

/// Does what is asked, one after the other, until nobody can ask any more. A panic ends what was asked alone; the file is
/// opened anew for the next.
fn work(mut store: Box<dyn Store>, jobs: &Receiver<Job>, condition: &Condition) {
    let mut saved = Instant::now();
    loop {
        let ended = match jobs.recv_timeout(SAVE_EVERY.saturating_sub(saved.elapsed())) {
            Ok(job) => {
                job(store.as_mut());
                false
            }
            Err(RecvTimeoutError::Timeout) => false,
            Err(RecvTimeoutError::Disconnected) => true,
        };
        if ended || saved.elapsed() >= SAVE_EVERY {
            caught(store.as_mut(), condition, |store| {
                if let Err(error) = store.save_traffic() {
                    tracing::error!(%error, "counts of experiments not saved");
                }
            });
            saved = Instant::now();
        }
        if ended {
            return;
        }
    }
}

/// What comes of a job; `None` where it panicked.
fn caught<T>(
    store: &mut dyn Store,
    condition: &Condition,
    job: impl FnOnce(&mut dyn Store) -> T,
) -> Option<T> {
    let done = catch_unwind(AssertUnwindSafe(|| job(store)));
    if let Err(panic) = &done {
        let text = panic_text(panic.as_ref());
        tracing::error!(panic = text, "the database of experiments panicked");
        condition.panicked(format!("the database of experiments is damaged: {text}"));
        // What a panic leaves of it may panic again.
        let _ = catch_unwind(AssertUnwindSafe(|| store.forget()));
    }
    done.ok()
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "no message".into())
}
