//! Experiments and votes in one redb file of one server: every commit is on the disk before it is acknowledged, and a kill
//! at any moment leaves the file as it was after the last one.

use std::{
    fs, io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{Arc, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use redb::{
    Database, DatabaseError, ReadableTable, ReadableTableMetadata, StorageError, TableDefinition,
    WriteTransaction,
};

use super::{
    Error,
    arms::Arm,
    ballot::{Choice, Pair, Vote},
    condition::Condition,
    experiment::{Experiment, Plan},
    panic_text,
    store::{Live, MAX_EXPERIMENTS, MAX_OPEN_PAIRS, PAIR_MILLISECONDS, Store, tell},
};

const FILE: &str = "experiments.redb";

/// What the tables below mean; a file of another format is not read.
const FORMAT: u64 = 1;

/// redb's own default is 1 GiB.
const CACHE_BYTES: usize = 4 << 20;

const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
/// Id → JSON of a record.
const EXPERIMENTS: TableDefinition<&str, &[u8]> = TableDefinition::new("experiments");
/// Pair → its experiment, when it was opened (Unix milliseconds), JSON. A pair's id begins with that time,
/// so the first is the oldest.
const OPEN_PAIRS: TableDefinition<&str, (&str, u64, &[u8])> = TableDefinition::new("open_pairs");
/// Experiment and pair → JSON of the vote.
const VOTES: TableDefinition<(&str, &str), &[u8]> = TableDefinition::new("votes");
/// Experiment and idempotency key → pair.
const KEYS: TableDefinition<(&str, &str), &str> = TableDefinition::new("keys");

/// The one who reads and writes the file.
pub(super) struct FileStore {
    file: PathBuf,
    /// Opened when first needed, and again after it failed.
    database: Option<Database>,
    /// The file that was opened, whatever is at its path now.
    opened: Option<Identity>,
    live: Live,
    condition: Arc<Condition>,
}

impl FileStore {
    /// Reads what is in `folder`; with `make`, makes the folder and the file now instead of when the first
    /// experiment is created.
    pub(super) fn open(
        folder: &Path,
        make: bool,
        condition: Arc<Condition>,
    ) -> Result<Self, Error> {
        let (file, live) = (folder.join(FILE), Live::default());
        let mut store = Self { file, database: None, opened: None, live, condition };
        if make || store.file.exists() {
            store.ready()?;
        }
        Ok(store)
    }

    /// The experiment as of the last commit.
    fn experiment(&mut self, id: &str) -> Result<Arc<Experiment>, Error> {
        let get = |live: &Live| {
            let live = live.read().unwrap_or_else(PoisonError::into_inner);
            live.get(id).cloned().ok_or_else(|| Error::Unknown(id.to_owned()))
        };
        // Who asks for what is not there makes no file.
        get(&self.live)?;
        self.ready()?;
        get(&self.live)
    }

    fn publish(&self, experiment: Experiment) -> Arc<Experiment> {
        let experiment = Arc::new(experiment);
        let mut live = self.live.write().unwrap_or_else(PoisonError::into_inner);
        live.insert(experiment.id.clone(), Arc::clone(&experiment));
        experiment
    }

    /// Commits what `change` does, or nothing of it.
    fn write<R>(
        &mut self,
        change: impl FnOnce(&WriteTransaction) -> Result<R, Error>,
    ) -> Result<R, Error> {
        let committed = self.commit(change);
        match &committed {
            Ok(_) => self.condition.kept(),
            Err(
                error @ (Error::Storage(_)
                | Error::Damaged(_)
                | Error::Full(_)
                | Error::Removed(_)
                | Error::Unavailable(_)),
            ) => {
                tracing::error!(%error, "experiments not kept");
                self.condition.failed(error.to_string(), matches!(error, Error::Damaged(_)));
            }
            Err(_) => {}
        }
        if matches!(committed, Err(Error::Storage(_) | Error::Damaged(_) | Error::Full(_))) {
            // What the disk has now is read again.
            self.database = None;
        }
        committed
    }

    fn commit<R>(
        &mut self,
        change: impl FnOnce(&WriteTransaction) -> Result<R, Error>,
    ) -> Result<R, Error> {
        self.ready()?;
        let Some(database) = &self.database else {
            return Err(Error::Storage("the database is not open".into()));
        };
        let named = |error| match error {
            Error::Full(_) => Error::Full(self.file.display().to_string()),
            error => error,
        };
        self.in_place()?;
        let transaction = database.begin_write().map_err(failed).map_err(named)?;
        // Dropping it without a commit takes back what was changed.
        let result = change(&transaction).map_err(named)?;
        transaction.commit().map_err(failed).map_err(named)?;
        // Whoever removed it meanwhile has removed what was written.
        self.in_place()?;
        Ok(result)
    }

    /// Whether the file that is open is the one that will be found at the next start.
    fn in_place(&self) -> Result<(), Error> {
        if self.opened.is_some() && identity(&self.file) != self.opened {
            return Err(Error::Removed(self.file.display().to_string()));
        }
        Ok(())
    }

    /// Opens the file where it is not, and reads its experiments.
    fn ready(&mut self) -> Result<(), Error> {
        if self.database.is_some() {
            return Ok(());
        }
        // A page that is damaged makes the database panic.
        let opened = catch_unwind(AssertUnwindSafe(|| open(&self.file)));
        let opened = opened.unwrap_or_else(|panic| {
            let text = panic_text(panic.as_ref());
            Err(Unopened::Damaged(text))
        });
        let (database, experiments) = opened.map_err(|failed| {
            let file = self.file.display();
            let error = match failed {
                Unopened::Full => Error::Full(file.to_string()),
                Unopened::Damaged(text) => Error::Damaged(format!("{file}: {text}")),
                Unopened::Otherwise(problem) => Error::Unavailable(format!("{file}: {problem}")),
            };
            self.condition.failed(error.to_string(), matches!(error, Error::Damaged(_)));
            error
        })?;
        self.opened = identity(&self.file);
        let mut live = self.live.write().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::take(&mut *live);
        for experiment in experiments {
            let experiment = match before.get(&experiment.id) {
                Some(before) => experiment.continuing(before),
                None => experiment,
            };
            live.insert(experiment.id.clone(), Arc::new(experiment));
        }
        self.database = Some(database);
        Ok(())
    }
}

impl Store for FileStore {
    fn live(&self) -> Live {
        Arc::clone(&self.live)
    }

    fn create(&mut self, id: &str, arms: Vec<Arm>, plan: Plan) -> Result<Arc<Experiment>, Error> {
        let experiment = Experiment::new(id.to_owned(), unix_milliseconds() / 1000, arms, plan)?;
        self.ready()?;
        let count = {
            let live = self.live.read().unwrap_or_else(PoisonError::into_inner);
            if live.contains_key(id) {
                return Err(Error::Exists(id.to_owned()));
            }
            live.len()
        };
        if count >= MAX_EXPERIMENTS {
            return Err(Error::TooMany);
        }
        self.write(|transaction| put(transaction, &experiment))?;
        Ok(self.publish(experiment))
    }

    fn reweight(&mut self, id: &str, changes: &[Arm]) -> Result<Arc<Experiment>, Error> {
        let experiment = self.experiment(id)?.reweighted(changes)?;
        self.write(|transaction| put(transaction, &experiment))?;
        Ok(self.publish(experiment))
    }

    fn review(&mut self, id: &str) -> Result<(), Error> {
        let experiment = match self.experiment(id) {
            // It has been deleted meanwhile.
            Err(Error::Unknown(_)) => return Ok(()),
            experiment => experiment?,
        };
        // Observations from here on may ask for the next review.
        experiment.end_review();
        if let Some((reviewed, changes)) = experiment.reviewed(unix_milliseconds() / 1000) {
            let kept = self.write(|transaction| put(transaction, &reviewed));
            if let Err(error) = kept {
                // Not asked again at every request while the disk is full, but when traffic is saved.
                experiment.take_review();
                return Err(error);
            }
            tell(&self.publish(reviewed), &changes);
        }
        Ok(())
    }

    fn delete(&mut self, id: &str) -> Result<(), Error> {
        self.experiment(id)?;
        // No id has a zero byte, so nothing but `id` lies between the two.
        let after = format!("{id}\0");
        self.write(|transaction| {
            transaction.open_table(EXPERIMENTS).map_err(failed)?.remove(id).map_err(failed)?;
            let mut pairs = transaction.open_table(OPEN_PAIRS).map_err(failed)?;
            pairs.retain(|_, (experiment, ..)| experiment != id).map_err(failed)?;
            let mut votes = transaction.open_table(VOTES).map_err(failed)?;
            votes.retain_in((id, "")..(after.as_str(), ""), |_, _| false).map_err(failed)?;
            let mut keys = transaction.open_table(KEYS).map_err(failed)?;
            keys.retain_in((id, "")..(after.as_str(), ""), |_, _| false).map_err(failed)?;
            Ok(())
        })?;
        self.live.write().unwrap_or_else(PoisonError::into_inner).remove(id);
        Ok(())
    }

    fn open_pair(&mut self, id: &str, pair: &Pair) -> Result<String, Error> {
        let experiment = self.experiment(id)?;
        // The experiment may be another one of the same id by now.
        if !pair.models.iter().all(|model| experiment.arm(model).is_some()) {
            return Err(Error::Unknown(id.to_owned()));
        }
        let now = unix_milliseconds();
        let random = getrandom::u64().map_err(failed_io)?;
        let pair_id = format!("{now:012x}{random:016x}");
        let json = serde_json::to_vec(pair).map_err(failed_io)?;
        self.write(|transaction| {
            let mut pairs = transaction.open_table(OPEN_PAIRS).map_err(failed)?;
            loop {
                let oldest = pairs.first().map_err(failed)?.map(|(_, pair)| pair.value().1);
                let expired = |opened| now.saturating_sub(opened) >= PAIR_MILLISECONDS;
                if !oldest.is_some_and(expired) && pairs.len().map_err(failed)? < MAX_OPEN_PAIRS {
                    break;
                }
                pairs.pop_first().map_err(failed)?;
            }
            pairs.insert(pair_id.as_str(), (id, now, json.as_slice())).map_err(failed)?;
            Ok(())
        })?;
        Ok(pair_id)
    }

    fn vote(
        &mut self,
        id: &str,
        pair_id: &str,
        choice: Choice,
        key: &str,
    ) -> Result<(Vote, bool), Error> {
        let mut experiment = (*self.experiment(id)?).clone();
        let now = unix_milliseconds();
        let mut changes = Vec::new();
        let (vote, counted) = self.write(|transaction| {
            let mut keys = transaction.open_table(KEYS).map_err(failed)?;
            let mut votes = transaction.open_table(VOTES).map_err(failed)?;
            let mut pairs = transaction.open_table(OPEN_PAIRS).map_err(failed)?;
            let keyed = keys.get((id, key)).map_err(failed)?.map(|pair| pair.value().to_owned());
            let voted = votes.get((id, pair_id)).map_err(failed)?;
            let voted = voted.map(|vote| parse::<Vote>(vote.value())).transpose()?;
            match (keyed, voted) {
                (Some(keyed), Some(vote)) if keyed == pair_id && vote.choice == choice => {
                    return Ok((vote, false));
                }
                (Some(_), _) => return Err(Error::KeyUsed(key.to_owned())),
                (None, Some(_)) => return Err(Error::Voted(pair_id.to_owned())),
                (None, None) => {}
            }
            let unknown = || Error::UnknownPair(pair_id.to_owned());
            let pair = {
                let open = pairs.get(pair_id).map_err(failed)?.ok_or_else(unknown)?;
                let (of, opened, json) = open.value();
                if of != id || now.saturating_sub(opened) >= PAIR_MILLISECONDS {
                    return Err(unknown());
                }
                parse::<Pair>(json)?
            };
            let models = pair.models.each_ref().map(String::as_str);
            if !experiment.count(models, choice.of_first()) {
                return Err(unknown());
            }
            let vote = Vote { pair, choice, key: key.to_owned(), at: now / 1000 };
            let json = serde_json::to_vec(&vote).map_err(failed_io)?;
            pairs.remove(pair_id).map_err(failed)?;
            votes.insert((id, pair_id), json.as_slice()).map_err(failed)?;
            keys.insert((id, key), pair_id).map_err(failed)?;
            if let Some((reviewed, decided)) = experiment.reviewed(now / 1000) {
                (experiment, changes) = (reviewed, decided);
            }
            put(transaction, &experiment)?;
            Ok((vote, true))
        })?;
        if counted {
            tell(&self.publish(experiment), &changes);
        }
        Ok((vote, counted))
    }

    fn save_traffic(&mut self) -> Result<(), Error> {
        let all: Vec<_> = {
            let live = self.live.read().unwrap_or_else(PoisonError::into_inner);
            live.values().filter(|experiment| experiment.take_unsaved()).cloned().collect()
        };
        if all.is_empty() {
            return Ok(());
        }
        all.iter().for_each(|experiment| experiment.end_review());
        let saved = self.write(|transaction| {
            all.iter().try_for_each(|experiment| put(transaction, experiment))
        });
        if saved.is_err() {
            all.iter().for_each(|experiment| experiment.mark_unsaved());
        }
        saved
    }

    fn close(&mut self) -> Result<(), Error> {
        self.save_traffic()?;
        self.database = None;
        Ok(())
    }

    fn forget(&mut self) {
        self.database = None;
    }
}

/// Which file it is, whatever it is called: its device and its number there.
type Identity = (u64, u64);

#[cfg(unix)]
fn identity(file: &Path) -> Option<Identity> {
    use std::os::unix::fs::MetadataExt;
    let metadata = fs::metadata(file).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

#[cfg(not(unix))]
fn identity(file: &Path) -> Option<Identity> {
    file.exists().then_some((0, 0))
}

/// Why the file cannot be opened.
enum Unopened {
    Full,
    /// What of it makes no sense.
    Damaged(String),
    /// A sentence.
    Otherwise(String),
}

impl From<String> for Unopened {
    fn from(problem: String) -> Self {
        Self::Otherwise(problem)
    }
}

/// The file's database and its experiments.
fn open(file: &Path) -> Result<(Database, Vec<Experiment>), Unopened> {
    let folder = file.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(|error| match is_full(&error) {
        true => Unopened::Full,
        false => format!("{error}; name another folder with --data-dir").into(),
    })?;
    let new = !file.exists();
    let database = Database::builder().set_cache_size(CACHE_BYTES).create(file).map_err(
        |error| match error {
            DatabaseError::DatabaseAlreadyOpen => Unopened::Otherwise(
                "another server has it open; give each server a folder of its own with --data-dir"
                    .into(),
            ),
            DatabaseError::Storage(StorageError::Io(error)) if is_full(&error) => Unopened::Full,
            DatabaseError::Storage(StorageError::Corrupted(text)) => Unopened::Damaged(text),
            error => format!("{error}; name another folder with --data-dir, or move the file away")
                .into(),
        },
    )?;
    if new {
        // So that the file's name outlives a power cut as well.
        sync(folder).map_err(|error| error.to_string())?;
    }
    let read = || -> Result<_, redb::Error> {
        let transaction = database.begin_write()?;
        let format = {
            let mut meta = transaction.open_table(META)?;
            let known = meta.get("format")?.map(|format| format.value());
            if known.is_none() {
                meta.insert("format", FORMAT)?;
            }
            known.unwrap_or(FORMAT)
        };
        let mut records = Vec::new();
        if format == FORMAT {
            for entry in transaction.open_table(EXPERIMENTS)?.iter()? {
                let (id, json) = entry?;
                records.push((id.value().to_owned(), json.value().to_owned()));
            }
        }
        transaction.commit()?;
        Ok((format, records))
    };
    let (format, records) = read().map_err(|error| match error {
        redb::Error::Io(error) if is_full(&error) => Unopened::Full,
        redb::Error::Corrupted(text) => Unopened::Damaged(text),
        error => error.to_string().into(),
    })?;
    if format != FORMAT {
        return Err(format!(
            "its format is {format}, this version of Understudy reads {FORMAT}; use the version that wrote it, or another folder with --data-dir"
        )
        .into());
    }
    let experiments = records.into_iter().map(|(id, json)| {
        let record = serde_json::from_slice(&json).ok();
        let experiment = record.and_then(|record| Experiment::from_record(id.clone(), record));
        experiment.ok_or_else(|| {
            Unopened::Damaged(format!("what it says of the experiment {id:?} cannot be read"))
        })
    });
    Ok((database, experiments.collect::<Result<_, _>>()?))
}

fn put(transaction: &WriteTransaction, experiment: &Experiment) -> Result<(), Error> {
    let json = serde_json::to_vec(&experiment.record()).map_err(failed_io)?;
    let mut table = transaction.open_table(EXPERIMENTS).map_err(failed)?;
    table.insert(experiment.id.as_str(), json.as_slice()).map_err(failed)?;
    Ok(())
}

fn parse<T: serde::de::DeserializeOwned>(json: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(json).map_err(|error| Error::Damaged(error.to_string()))
}

pub(super) fn failed(error: impl Into<redb::Error>) -> Error {
    match error.into() {
        redb::Error::Io(error) if is_full(&error) => Error::Full(String::new()),
        redb::Error::Corrupted(text) => Error::Damaged(text),
        error => Error::Storage(error.to_string()),
    }
}

/// Whether there is no room for what was to be written.
fn is_full(error: &io::Error) -> bool {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge)
}

fn failed_io(error: impl std::fmt::Display) -> Error {
    Error::Storage(error.to_string())
}

#[cfg(unix)]
fn sync(folder: &Path) -> io::Result<()> {
    fs::File::open(folder)?.sync_all()
}

#[cfg(not(unix))]
fn sync(_: &Path) -> io::Result<()> {
    Ok(())
}

fn unix_milliseconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_millis() as u64)
}
