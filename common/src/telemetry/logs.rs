//! Structured logs on standard error, and the tracer that gives every span its ids.

use std::{
    fmt,
    io::{self, IsTerminal as _},
    path::PathBuf,
};

use opentelemetry::{Context, trace::TraceContextExt as _, trace::TracerProvider as _};
use opentelemetry_sdk::trace::SdkTracerProvider;
use serde::Serialize;
use serde_json::{Map, Value};
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
    info, warn,
};
use tracing_subscriber::{
    EnvFilter, Layer,
    filter::{FilterFn, LevelFilter, ParseError},
    fmt::{
        FmtContext, FormatEvent, FormatFields, FormattedFields, MakeWriter,
        format::{JsonFields, Writer},
        time::{FormatTime as _, SystemTime as Timestamp},
    },
    layer::SubscriberExt as _,
    registry::LookupSpan,
    reload,
    util::{SubscriberInitExt as _, TryInitError},
};

use super::{
    filter_file::{FilterFile, FilterFileError},
    traces::{FLUSH_MAX, Traces},
};

/// What is logged when nothing is said: changes of state, and all that is odd.
const DEFAULT_FILTER: &str = "info";

/// How logs are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Lines for a person.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// The flags of logging, to be flattened into a daemon's arguments.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct LogOptions {
    /// How logs are written.
    #[arg(long = "log-format", value_enum, default_value_t, env = "MARCOT_LOG_FORMAT")]
    pub format: LogFormat,

    /// What is logged, as `info` or `warn,marcot_donor=debug`; else RUST_LOG's value, else `info`.
    #[arg(id = "log", long = "log", value_name = "FILTER", env = "MARCOT_LOG")]
    pub filter: Option<String>,

    /// A filter in a file, in the place of --log: read again when it changes, without a restart. # begins
    /// a remark; a file that has become wrong changes nothing.
    #[arg(long = "log-filter-file", value_name = "FILE", env = "MARCOT_LOG_FILTER_FILE")]
    pub filter_file: Option<PathBuf>,
}

/// Why telemetry does not start.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter is wrong.
    #[error("log filter `{filter}` (--log, MARCOT_LOG or RUST_LOG): {source}")]
    Filter {
        /// What was given.
        filter: String,
        /// What is wrong with it.
        source: ParseError,
    },
    /// Its file is wrong.
    #[error(transparent)]
    FilterFile(#[from] FilterFileError),
    /// It has started already.
    #[error("start logging: {0}")]
    Started(#[from] TryInitError),
}

/// Telemetry that runs; [`Telemetry::shutdown`] hands over what is still held.
#[derive(Debug)]
pub struct Telemetry {
    provider: SdkTracerProvider,
}

impl Telemetry {
    /// Ends tracing, within a bound. An error is no reason for another exit code: it is logged.
    pub fn shutdown(self) {
        if let Err(error) = self.provider.shutdown_with_timeout(FLUSH_MAX) {
            warn!(%error, "the last spans are lost");
        }
    }
}

/// Starts logs and tracing for this process; `service` names the tracer. Once, before all else, within
/// a runtime.
pub fn init(service: &'static str, options: &LogOptions) -> Result<Telemetry, TelemetryError> {
    let filter = match &options.filter {
        Some(filter) => filter.clone(),
        None => std::env::var("RUST_LOG")
            .ok()
            .filter(|filter| !filter.is_empty())
            .unwrap_or_else(|| DEFAULT_FILTER.to_owned()),
    };
    let file = options.filter_file.as_deref();
    let file = file.map(|path| FilterFile::open(path, filter.clone())).transpose()?;
    let filter = file.as_ref().map_or(filter, FilterFile::current);
    let traces = Traces::from_env(service);
    let (subscriber, reload) = subscriber(service, options.format, &filter, &traces, io::stderr)?;
    subscriber.try_init()?;
    for warning in &traces.warnings {
        warn!("{warning}");
    }
    if let Some(collector) = &traces.endpoint {
        info!(%collector, "spans are exported");
    }
    if let Some(file) = file {
        tokio::spawn(file.follow(reload));
    }
    Ok(Telemetry { provider: traces.provider })
}

/// Puts another filter in the place of the present one.
pub(super) type Reload = Box<dyn Fn(EnvFilter) + Send + Sync>;

/// The layers, writing to `writer`, and what changes the filter of the log.
pub(super) fn subscriber<W>(
    service: &'static str,
    format: LogFormat,
    filter: &str,
    traces: &Traces,
    writer: W,
) -> Result<(impl Subscriber + Send + Sync + use<W>, Reload), TelemetryError>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let filter = EnvFilter::builder()
        .parse(filter)
        .map_err(|source| TelemetryError::Filter { filter: filter.to_owned(), source })?;
    let (filter, handle) = reload::Layer::new(filter);
    // A filter of its own: a quiet log must not take the spans away that carry the trace context. Ours
    // only: an export's own calls must not make more spans.
    let level = traces.level;
    let ours = FilterFn::new(move |metadata| {
        metadata.is_span() && *metadata.level() <= level && metadata.target().starts_with("marcot")
    });
    let spans = tracing_opentelemetry::layer()
        .with_tracer(traces.provider.tracer(service))
        .with_location(false)
        .with_target(false)
        .with_threads(false)
        .with_tracked_inactivity(false)
        .with_filter(ours.with_max_level_hint(LevelFilter::from_level(level)));
    let logs = match format {
        LogFormat::Text => tracing_subscriber::fmt::layer()
            .with_ansi(io::stderr().is_terminal())
            .with_writer(writer)
            .boxed(),
        LogFormat::Json => tracing_subscriber::fmt::layer()
            .fmt_fields(JsonFields::new())
            .event_format(JsonLines)
            .with_writer(writer)
            .boxed(),
    };
    // The traces come first, so that the context of a span is there when a line is written.
    let subscriber = tracing_subscriber::registry().with(spans).with(logs.with_filter(filter));
    let reload: Reload = Box::new(move |filter| {
        // It fails only when the subscriber has gone, with the process.
        drop(handle.reload(filter));
    });
    Ok((subscriber, reload))
}

/// One line; the order of the fields is the order in the line.
#[derive(Serialize)]
struct Line<'a> {
    timestamp: String,
    level: &'a str,
    target: &'a str,
    message: String,
    fields: Map<String, Value>,
    /// Outermost first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    spans: Vec<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    trace_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    span_id: Option<String>,
}

/// Writes events as JSON lines.
struct JsonLines;

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut timestamp = String::new();
        Timestamp.format_time(&mut Writer::new(&mut timestamp))?;
        let mut fields = Fields::default();
        event.record(&mut fields);
        let spans = context.event_scope().into_iter().flat_map(|scope| scope.from_root());
        let spans = spans
            .map(|span| {
                let extensions = span.extensions();
                let mut fields: Map<String, Value> = extensions
                    .get::<FormattedFields<N>>()
                    .and_then(|fields| serde_json::from_str(fields).ok())
                    .unwrap_or_default();
                fields.insert("name".to_owned(), span.name().into());
                Value::Object(fields)
            })
            .collect();
        let current = Context::current();
        let span = current.span();
        let ids = Some(span.span_context()).filter(|ids| ids.is_valid());
        let line = Line {
            timestamp,
            level: event.metadata().level().as_str(),
            target: event.metadata().target(),
            message: fields.message,
            fields: fields.others,
            spans,
            trace_id: ids.map(|ids| ids.trace_id().to_string()),
            span_id: ids.map(|ids| ids.span_id().to_string()),
        };
        let line = serde_json::to_string(&line).map_err(|_| fmt::Error)?;
        writeln!(writer, "{line}")
    }
}

/// Collects an event's fields.
#[derive(Default)]
struct Fields {
    message: String,
    others: Map<String, Value>,
}

impl Fields {
    fn add(&mut self, field: &Field, value: impl Into<Value>) {
        self.others.insert(field.name().to_owned(), value.into());
    }

    fn add_text(&mut self, field: &Field, text: String) {
        if field.name() == "message" {
            self.message = text;
        } else {
            self.add(field, text);
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.add_text(field, format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.add_text(field, value.to_owned());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field, value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.add(field, value);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::{Arc, Mutex};

    use tracing::{Span, debug, debug_span, info_span};

    use super::*;
    use crate::telemetry::traces::LEVEL_OFF;

    /// Lines that were written.
    #[derive(Clone, Default)]
    pub(in crate::telemetry) struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Lines {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }

        fn json(&self) -> Vec<Value> {
            self.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
        }
    }

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Spans that nobody is told of.
    fn untold() -> Traces {
        Traces {
            provider: SdkTracerProvider::builder().build(),
            level: LEVEL_OFF,
            endpoint: None,
            warnings: Vec::new(),
        }
    }

    /// A subscriber that logs by a filter, and its lines.
    pub(in crate::telemetry) fn quiet(
        format: LogFormat,
        filter: &str,
    ) -> (impl Subscriber + Send + Sync + use<>, Lines) {
        let lines = Lines::default();
        let writer = lines.clone();
        let made = subscriber("test", format, filter, &untold(), move || writer.clone());
        (made.unwrap().0, lines)
    }

    #[test]
    fn a_json_line_has_time_level_target_fields_spans_and_trace() {
        let (subscriber, lines) = quiet(LogFormat::Json, "info");
        tracing::subscriber::with_default(subscriber, || {
            let _span = info_span!("clone", clone = "c-1").entered();
            info!(bytes = 7_u64, path = "a\nb", ratio = f64::NAN, "stage finished");
        });
        let [line] = &lines.json()[..] else { panic!("{}", lines.text()) };
        assert!(line["timestamp"].as_str().unwrap().ends_with('Z'));
        assert_eq!(line["level"], "INFO");
        assert!(line["target"].as_str().unwrap().starts_with("marcot_common::telemetry"));
        assert_eq!(line["message"], "stage finished");
        assert_eq!(line["fields"]["bytes"], 7);
        assert_eq!(line["fields"]["path"], "a\nb");
        assert_eq!(line["spans"][0]["name"], "clone");
        assert_eq!(line["spans"][0]["clone"], "c-1");
        assert_eq!(line["trace_id"].as_str().unwrap().len(), 32);
        assert_eq!(line["span_id"].as_str().unwrap().len(), 16);
    }

    #[test]
    fn a_quiet_log_still_knows_its_trace() {
        let (subscriber, lines) = quiet(LogFormat::Json, "warn");
        tracing::subscriber::with_default(subscriber, || {
            let _span = info_span!("clone").entered();
            info!("not written");
            warn!("written");
        });
        let [line] = &lines.json()[..] else { panic!("{}", lines.text()) };
        assert_eq!(line["message"], "written");
        assert!(line["trace_id"].is_string(), "{line}");
    }

    #[test]
    fn a_line_outside_of_spans_has_no_trace() {
        let (subscriber, lines) = quiet(LogFormat::Json, "info");
        tracing::subscriber::with_default(subscriber, || info!("alone"));
        assert!(lines.json()[0].get("trace_id").is_none());
    }

    #[test]
    fn text_lines_have_fields_and_no_colour_beside_a_terminal() {
        let (subscriber, lines) = quiet(LogFormat::Text, "info,marcot_common=warn");
        tracing::subscriber::with_default(subscriber, || {
            info!("not written");
            warn!(bytes = 7, "written");
        });
        let text = lines.text();
        assert!(text.contains("WARN") && text.contains("written bytes=7"), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    }

    #[test]
    fn a_wrong_filter_is_named() {
        let made = subscriber("test", LogFormat::Text, "marcot=loud", &untold(), io::sink);
        let error = made.err().unwrap().to_string();
        assert!(error.contains("`marcot=loud`") && error.contains("MARCOT_LOG"), "{error}");
    }

    #[test]
    fn another_filter_takes_the_place_of_the_present_one() {
        let lines = Lines::default();
        let writer = lines.clone();
        let made = subscriber("test", LogFormat::Json, "warn", &untold(), move || writer.clone());
        let (subscriber, reload) = made.unwrap();
        tracing::subscriber::with_default(subscriber, || {
            let say = || debug!("said");
            say();
            reload(EnvFilter::new("debug"));
            say();
            reload(EnvFilter::new("warn"));
            say();
        });
        assert_eq!(lines.json().len(), 1, "{}", lines.text());
    }

    /// Guards the cost of spans that nobody is told of: those of stages and batches are not made.
    #[test]
    fn without_a_collector_there_are_no_spans_of_stages_and_batches() {
        let (subscriber, _) = quiet(LogFormat::Json, "info");
        tracing::subscriber::with_default(subscriber, || {
            assert!(debug_span!("batch").is_disabled());
            assert!(!info_span!("clone").is_disabled());
            assert!(Span::current().is_none());
        });
    }
}
