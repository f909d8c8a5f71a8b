//! A training, told to an MLflow tracking server over its REST interface (`api/2.0/mlflow`).
//!
//! A thread of its own talks to the server, so a training never waits for it. The first thing that goes wrong is said once,
//! and nothing more is sent.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, Sender, channel},
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::{Map, Value, json};
use understudy_distill::watch::{Event, Record};
use understudy_models::checkpoint::write_atomically;
use ureq::{Agent, http::StatusCode};

/// Steps between two lines of metrics.
const LOG_EVERY: u64 = 50;
/// The most that a request may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the end of a run waits for what is still to be sent.
const LAST_WORDS: Duration = Duration::from_secs(15);
/// Where a run's folder keeps which MLflow run it is.
const FILE: &str = "mlflow.json";
/// MLflow's limits on one request, and on a parameter's value.
const MAX_PARAMETERS: usize = 100;
const MAX_METRICS: usize = 1000;
const MAX_VALUE_CHARACTERS: usize = 500;

/// Where a run is told of.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    /// The server's address: `http://` or `https://`.
    pub(crate) url: String,
    /// The experiment, made when it is not there.
    pub(crate) experiment: String,
}

/// How a run ended, in MLflow's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    /// Its model is there.
    Finished,
    /// It was stopped and goes on another time.
    Killed,
    /// Something went wrong.
    Failed,
}

/// A run that is told of. Dropping it tells its end, and waits some seconds for that.
#[derive(Debug)]
pub(crate) struct Tracking {
    messages: Sender<Message>,
    /// Disconnected when everything has been sent.
    sent: Receiver<()>,
    /// What the run is, until it begins.
    parameters: Option<Map<String, Value>>,
    interval: Interval,
    status: Status,
    report: Option<PathBuf>,
}

/// Steps since the last line of metrics.
#[derive(Debug, Default)]
struct Interval {
    losses: f64,
    steps: u64,
}

#[derive(Debug)]
enum Message {
    /// The run begins, or goes on; its parameters.
    Begun(Map<String, Value>),
    /// Values at a step and a time in Unix milliseconds.
    Metrics(Vec<(&'static str, f64)>, u64, u64),
    /// Whoever goes on with the run goes on with MLflow's, too.
    Kept,
    Ended(Status, Option<PathBuf>),
}

impl Tracking {
    /// Begins to tell of the run in `folder`, which is called `name`; nothing is sent before its first step.
    ///
    /// # Errors
    /// A sentence for an address that is none, and when there is no thread to be had.
    pub(crate) fn new(place: Place, name: String, folder: PathBuf) -> Result<Self, String> {
        let Place { url, .. } = &place;
        if !["http://", "https://"].iter().any(|scheme| url.starts_with(scheme)) {
            return Err(format!(
                "--mlflow {url}: give the server's address, such as http://localhost:5000"
            ));
        }
        let (messages, received) = channel();
        let (done, sent) = channel();
        let work = move || {
            let _done = done;
            let url = place.url.clone();
            if let Err(problem) = Server::new(place, name, folder).follow(&received) {
                tracing::warn!("--mlflow {url}: {problem}; the run goes on without it");
            }
        };
        thread::Builder::new()
            .name("mlflow".into())
            .spawn(work)
            .map_err(|error| format!("--mlflow: no thread: {error}"))?;
        let (parameters, interval) = (None, Interval::default());
        Ok(Self { messages, sent, parameters, interval, status: Status::Failed, report: None })
    }

    /// Something happened in the run.
    pub(crate) fn event(&mut self, event: Event<'_>) {
        match event {
            Event::Begun { identity } => self.parameters = Some(identity.clone()),
            Event::Preparing { .. } => self.begin(),
            Event::Step { record, steps } => {
                self.begin();
                self.step(record, steps);
            }
            Event::Checkpoint { .. } => self.send(Message::Kept),
            Event::Resumed { .. } | Event::Estimated(_) => {}
        }
    }

    /// How it ended, and its report where there is one; what nobody says is a failure.
    pub(crate) fn ended(&mut self, status: Status, report: Option<PathBuf>) {
        (self.status, self.report) = (status, report);
    }

    fn begin(&mut self) {
        if let Some(parameters) = self.parameters.take() {
            self.send(Message::Begun(parameters));
        }
    }

    fn step(&mut self, record: &Record, steps: u64) {
        let Interval { losses, steps: count } = &mut self.interval;
        *losses += f64::from(record.simple);
        *count += 1;
        if !record.step.is_multiple_of(LOG_EVERY) && record.step < steps {
            return;
        }
        let loss = *losses / *count as f64;
        self.interval = Interval::default();
        let values = vec![
            ("loss", loss),
            ("gradient_norm", record.gradient_norm),
            ("learning_rate", record.learning_rate),
            ("images_per_second", record.images_per_second),
            ("teacher_evaluations", record.teacher_evaluations as f64),
        ];
        self.send(Message::Metrics(values, record.step, now()));
    }

    fn send(&self, message: Message) {
        // Nobody receives any more once something went wrong.
        let _ = self.messages.send(message);
    }
}

impl Drop for Tracking {
    fn drop(&mut self) {
        // A run that has not begun has no end.
        if self.parameters.is_some() {
            return;
        }
        let report = self.report.take();
        self.send(Message::Ended(self.status, report));
        let _ = self.sent.recv_timeout(LAST_WORDS);
    }
}

/// The server, as one run sees it.
struct Server {
    place: Place,
    name: String,
    folder: PathBuf,
    agent: Agent,
}

/// MLflow's run.
struct Run {
    id: String,
    /// Where its artifacts are.
    artifacts: String,
}

impl Server {
    fn new(place: Place, name: String, folder: PathBuf) -> Self {
        let agent = Agent::config_builder()
            .timeout_global(Some(PATIENCE))
            .http_status_as_error(false)
            .build();
        Self { place, name, folder, agent: agent.into() }
    }

    /// Sends what comes, until the run ends.
    fn follow(&self, messages: &Receiver<Message>) -> Result<(), String> {
        let mut run: Option<Run> = None;
        let mut waiting = None;
        while let Some(message) = waiting.take().or_else(|| messages.recv().ok()) {
            match (message, &run) {
                (Message::Begun(parameters), _) => run = Some(self.begin(&parameters)?),
                (Message::Metrics(values, step, time), Some(run)) => {
                    let mut metrics = written(&values, step, time);
                    // What came meanwhile goes with it.
                    while metrics.len() + values.len() <= MAX_METRICS {
                        match messages.try_recv() {
                            Ok(Message::Metrics(values, step, time)) => {
                                metrics.extend(written(&values, step, time));
                            }
                            Ok(other) => {
                                waiting = Some(other);
                                break;
                            }
                            Err(_) => break,
                        }
                    }
                    self.post("runs/log-batch", &json!({"run_id": run.id, "metrics": metrics}))?;
                }
                (Message::Kept, Some(run)) => self.keep(run)?,
                (Message::Ended(status, report), Some(run)) => {
                    return self.end(run, status, report.as_deref());
                }
                (Message::Ended(..), None) => return Ok(()),
                (_, None) => {}
            }
        }
        Ok(())
    }

    /// Goes on with the run that the folder tells of, or begins one.
    fn begin(&self, parameters: &Map<String, Value>) -> Result<Run, String> {
        if let Some(id) = self.kept() {
            let update = json!({"run_id": id, "status": "RUNNING"});
            // One that was deleted there is begun anew.
            if let Ok(answer) = self.post("runs/update", &update) {
                return Ok(Run { id, artifacts: text(&answer, "/run_info/artifact_uri") });
            }
        }
        let experiment = self.experiment()?;
        let tags = json!([{"key": "mlflow.source.name", "value": "understudy"}, {"key": "mlflow.source.type", "value": "LOCAL"}]);
        let new = json!({"experiment_id": experiment, "run_name": self.name, "start_time": now(), "tags": tags});
        let answer = self.post("runs/create", &new)?;
        let run = Run {
            id: text(&answer, "/run/info/run_id"),
            artifacts: text(&answer, "/run/info/artifact_uri"),
        };
        let named = parameters.iter().filter(|(_, value)| !value.is_null());
        let named: Vec<Value> =
            named.map(|(key, value)| json!({"key": key, "value": short(value)})).collect();
        for some in named.chunks(MAX_PARAMETERS) {
            self.post("runs/log-batch", &json!({"run_id": run.id, "params": some}))?;
        }
        Ok(run)
    }

    fn experiment(&self) -> Result<String, String> {
        let name = &self.place.experiment;
        let url = self.url("experiments/get-by-name");
        let found = self.answer(self.agent.get(&url).query("experiment_name", name).call())?;
        match found {
            Ok(answer) => Ok(text(&answer, "/experiment/experiment_id")),
            Err((StatusCode::NOT_FOUND, _)) => {
                let answer = self.post("experiments/create", &json!({"name": name}))?;
                Ok(text(&answer, "/experiment_id"))
            }
            Err((status, problem)) => Err(format!("experiment {name:?}: {status}: {problem}")),
        }
    }

    fn end(&self, run: &Run, status: Status, report: Option<&Path>) -> Result<(), String> {
        let status = match status {
            Status::Finished => "FINISHED",
            Status::Killed => "KILLED",
            Status::Failed => "FAILED",
        };
        // Before the report, which may be more than the server takes.
        let update = json!({"run_id": run.id, "status": status, "end_time": now()});
        self.post("runs/update", &update)?;
        // Where the server keeps artifacts itself, it takes them by HTTP.
        if let (Some(report), Some(place)) =
            (report, run.artifacts.strip_prefix("mlflow-artifacts:/"))
        {
            let place = place.trim_start_matches('/');
            let url =
                format!("{}/api/2.0/mlflow-artifacts/artifacts/{place}/report.html", self.base());
            let page =
                fs::read(report).map_err(|error| format!("{}: {error}", report.display()))?;
            let put = self.agent.put(&url).content_type("text/html").send(&page[..]);
            self.answer(put)?
                .map_err(|(status, problem)| format!("report.html: {status}: {problem}"))?;
        }
        Ok(())
    }

    /// Which MLflow run this run was on this server.
    fn kept(&self) -> Option<String> {
        let kept = fs::read(self.folder.join(FILE)).ok()?;
        let kept: Value = serde_json::from_slice(&kept).ok()?;
        let here = kept["url"] == self.place.url && kept["experiment"] == self.place.experiment;
        here.then(|| kept["run_id"].as_str().map(str::to_owned)).flatten()
    }

    fn keep(&self, run: &Run) -> Result<(), String> {
        let Place { url, experiment } = &self.place;
        let kept = json!({"url": url, "experiment": experiment, "run_id": run.id});
        write_atomically(&self.folder.join(FILE), format!("{kept}\n").as_bytes())
            .map_err(|error| error.to_string())
    }

    fn base(&self) -> &str {
        self.place.url.trim_end_matches('/')
    }

    fn url(&self, call: &str) -> String {
        format!("{}/api/2.0/mlflow/{call}", self.base())
    }

    fn post(&self, call: &str, body: &Value) -> Result<Value, String> {
        let answer = self.answer(self.agent.post(&self.url(call)).send_json(body))?;
        answer.map_err(|(status, problem)| format!("{call}: {status}: {problem}"))
    }

    /// The JSON of an answer, or its status and what it says of it.
    #[allow(clippy::type_complexity)]
    fn answer(
        &self,
        response: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
    ) -> Result<Result<Value, (StatusCode, String)>, String> {
        let mut response = response.map_err(|error| error.to_string())?;
        let status = response.status();
        let text = response.body_mut().read_to_string().map_err(|error| error.to_string())?;
        let body: Value = serde_json::from_str(&text).unwrap_or_default();
        if status.is_success() {
            return Ok(Ok(body));
        }
        let said = body["message"].as_str().unwrap_or(&text).chars().take(200).collect();
        Ok(Err((status, said)))
    }
}

fn written(values: &[(&str, f64)], step: u64, time: u64) -> Vec<Value> {
    let finite = values.iter().filter(|(_, value)| value.is_finite());
    finite
        .map(|(key, value)| json!({"key": key, "value": value, "timestamp": time, "step": step}))
        .collect()
}

/// A parameter as MLflow takes it.
fn short(value: &Value) -> String {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    if text.chars().count() <= MAX_VALUE_CHARACTERS {
        return text;
    }
    text.chars().take(MAX_VALUE_CHARACTERS - 1).chain(['…']).collect()
}

fn text(answer: &Value, at: &str) -> String {
    answer.pointer(at).and_then(Value::as_str).unwrap_or_default().to_owned()
}

/// Unix milliseconds.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_millis() as u64)
}
